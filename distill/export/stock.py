"""The script that `verify` runs in a process where importing this package fails: argv = (steps, base, device, folder, ...).

Prints a list with one item a folder: the largest difference to the trainer's samples, or what failed.
"""

import functools
import inspect
import json
import sys
from pathlib import Path


def read(folder):
    """The reference noise, samples and conditions of an export, by name."""
    from safetensors.torch import load_file

    return load_file(folder / "reference.safetensors")


def dtype_of(record):
    """The torch dtype of an export's weights."""
    import torch

    return getattr(torch, record.get("dtype", "float32"))


def randomness(record, noise):
    """The CPU's generator as it was when the references' noise had been drawn, and before."""
    import torch

    generator = torch.Generator().manual_seed(record["reference"]["seed"])
    start = generator.get_state()
    if not torch.equal(torch.randn(noise.shape, generator=generator, dtype=noise.dtype), noise):
        raise ValueError("torch draws other numbers in this process than where the references were made")
    return generator, start


def draw_from(scheduler, generator):
    """Let the scheduler draw from `generator`: not every pipeline passes its own on."""
    step = scheduler.step
    if "generator" in inspect.signature(step).parameters:

        @functools.wraps(step)
        def step_with_generator(*args, **kw):
            return step(*args, **kw | {"generator": generator})

        scheduler.step = step_with_generator


def relative_difference(x, ours):
    """max |x - ours| / max(|ours|, 1); infinite where x is not a number."""
    x, ours = x.cpu().float(), ours.float()
    return ((x - ours).abs().max() / ours.abs().max().clamp(min=1)).nan_to_num(nan=float("inf")).item()


def from_prompts(pipe, folder, record, steps, device):
    """Sample from prompts, by the call in distill.json."""
    stored = read(folder)
    generator, _ = randomness(record, stored["noise"])
    pipe.to(device)
    draw_from(pipe.scheduler, generator)
    pipe.set_progress_bar_config(disable=True)
    call = record["reference"]["call"] | record["call"]
    if steps != record["steps"]:
        call = {k: v for k, v in call.items() if k not in ("sigmas", "timesteps")} | {"num_inference_steps": steps}
    latents = pipe(
        prompt=list(record["reference"]["prompts"]),  # some pipelines change the list that they are given
        latents=stored["noise"].to(dtype_of(record), copy=True),
        generator=generator,
        output_type="latent",
        return_dict=False,
        **call,
    )[0]
    return relative_difference(latents, stored["samples"])


def pixels(folder, record, steps, device):
    """Sample from labels or unconditionally, by a pipeline that draws its own noise; the images count too."""
    import torch
    from diffusers import DiffusionPipeline

    stored, states = read(folder), []
    noise, ours = stored["noise"], stored["samples"]
    generator, start = randomness(record, noise)
    generator.set_state(start)
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, dtype=dtype_of(record)).to(device)
    pipe.set_progress_bar_config(disable=True)
    draw_from(pipe.scheduler, generator)
    step = pipe.scheduler.step

    def recording_step(*args, **kw):
        states.append(step(*args, **kw))
        return states[-1]

    pipe.scheduler.step = recording_step
    call = record.get("call", {"guidance_scale": 1.0} if "transformer" in pipe.components else {}) | {
        "num_inference_steps": steps
    }
    call |= {"class_labels": stored["labels"].tolist()} if "labels" in stored else {}
    call |= {} if "transformer" in pipe.components else {"batch_size": len(noise)}
    images = pipe(generator=generator, output_type="np", **call).images
    image_difference = torch.from_numpy(images).permute(0, 3, 1, 2) - (ours.float() / 2 + 0.5).clamp(0, 1)
    return max(
        relative_difference(states[-1].prev_sample, ours),
        2 * image_difference.abs().max().nan_to_num(nan=float("inf")).item(),
    )


def pipeline(folder, record, steps, base, device):
    """The whole pipeline folder, from prompts or labels."""
    from diffusers import DiffusionPipeline

    if "prompts" not in record["reference"]:
        return pixels(folder, record, steps, device)
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, dtype=dtype_of(record))
    return from_prompts(pipe, folder, record, steps, device)


def on_base(folder, record, base):
    """The base's pipeline with the export's scheduler."""
    import diffusers

    scheduler = getattr(diffusers, record["scheduler"]).from_pretrained(folder, subfolder="scheduler")
    return diffusers.DiffusionPipeline.from_pretrained(
        base or record["base"], scheduler=scheduler, dtype=dtype_of(record), variant=record.get("variant")
    )


def layers_of(file):
    """The number of layers in a LoRA file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return sum(key.endswith((".lora_A.weight", ".lora_down.weight")) for key in stored.keys())


def adapted_layers(pipe, part):
    """The number of layers of a part that have an adapter: keys without a layer are only logged by the loader."""
    return sum(name.endswith(".lora_A") for name, _ in getattr(pipe, part).named_modules())


def lora(folder, record, steps, base, device):
    """Each file at weight 1.0 on the base."""
    worst = 0.0
    for file in record["files"]:
        pipe = on_base(folder, record, base)
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(folder, weight_name=file)
            landed, written = adapted_layers(pipe, record["part"]), layers_of(folder / file)
            if landed < written:
                raise ValueError(f"only {landed} of the {written} layers of {file} were loaded")
        else:
            from peft import PeftModel

            part = record["part"]
            setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder).merge_and_unload())
        worst = max(worst, from_prompts(pipe, folder, record, steps, device))
    return worst


def single_file(folder, record, steps, base, device):
    """The network's file on the base."""
    import diffusers

    kind, part = getattr(diffusers, record["network"]), record["part"]
    pipe = on_base(folder, record, base)
    # Given to from_pretrained instead, it would be ignored where the pipeline has it as optional.
    where = {"config": base or record["base"], "subfolder": part}
    setattr(pipe, part, kind.from_single_file(str(folder / record["file"]), torch_dtype=dtype_of(record), **where))
    return from_prompts(pipe, folder, record, steps, device)


def onnx(folder, record, steps, base, device):
    """All steps in onnxruntime, from the stored noise and conditions."""
    import numpy as np
    import onnxruntime
    from safetensors.numpy import load_file

    if steps != record["steps"]:
        raise ValueError(f"the stored noise is that of {record['steps']} steps")
    stored, experiment = (
        load_file(folder / "reference.safetensors"),
        onnxruntime.InferenceSession(folder / record["file"]),
    )
    x = stored["noise"]
    for k, (t, s) in enumerate(zip(record["times"], record["times"][1:])):
        conditions = {name: stored[name] for name in record["conditions"]}
        conditions |= {"x_t": x, "t": np.full(len(x), t, np.float32), "s": np.full(len(x), s, np.float32)}
        if record["sampler"] == "renoise":
            conditions["noise"] = stored["fresh"][k]
        size = record["batch"] or len(x)
        x = np.concatenate(
            [
                experiment.run(["x_s"], {name: v[i : i + size] for name, v in conditions.items()})[0]
                for i in range(0, len(x), size)
            ]
        )
    worst = np.abs(x - stored["samples"]).max() / max(np.abs(stored["samples"]).max(), 1)
    return float(worst) if np.isfinite(worst) else float("inf")


def difference(folder, steps, base, device):
    """The largest difference of one export, by its kind, or a sentence that says what failed."""
    try:
        record = json.loads((folder / "distill.json").read_text())
        kind = record.get("kind", "pipeline").replace("-", "_")
        return {"pipeline": pipeline, "lora": lora, "single_file": single_file, "onnx": onnx}[kind](
            folder, record, steps, base, device
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.modules["distill"] = None  # importing it fails from now on
    counts, given, device, *folders = sys.argv[1:]
    print(json.dumps([difference(Path(f), k, given, device) for f, k in zip(folders, json.loads(counts))]))
