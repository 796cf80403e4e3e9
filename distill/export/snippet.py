"""The code on a model card that loads an export and draws from it, without this package."""

from __future__ import annotations

from distill.models.families.family import Family


def _family(record: dict) -> Family:
    """The family of the exported network; one of defaults alone where there is none."""
    from distill.models.families.registry import LABEL_FAMILIES, family_of

    if "network" in record:
        return family_of(record["network"]) or Family(network=record["network"])
    return next(family for family in LABEL_FAMILIES.values() if family.part == record.get("part", "unet"))


def kind_phrase(record: dict) -> str:
    """What the export is and who loads it, after "A diffusion model"."""
    kind, comfyui = record.get("kind", "pipeline"), False
    if kind in ("lora", "single-file"):
        family = _family(record)
        comfyui = bool(family.lora_keys if kind == "lora" else family.original_keys)
    readers = "stock diffusers" + " and ComfyUI" * comfyui
    return {
        "pipeline": f" for {readers}",
        "lora": f" as a LoRA for {readers}",
        "single-file": f" as one file for {readers}",
        "onnx": " as an ONNX graph",
    }[kind]


def is_guided(record: dict) -> bool:
    """Whether the weights reproduce a guided model: w = 1 is the conditional one."""
    return record["guidance"] not in (None, 1)


def pipeline_tag(record: dict) -> str | None:
    """The hub's name of what the model does; it has none for images of a class."""
    if "base" not in record:
        return None if record["classes"] else "unconditional-image-generation"
    return "text-to-video" if _family(record).frames else "text-to-image"


def usage_snippet(record: dict, name: str) -> tuple[str, str]:
    """Code that draws samples, and one sentence about the call."""
    if record.get("kind") == "onnx":
        return _onnx(record, name)
    return _text(record, name) if "base" in record else _pixels(record, name)


def _pixels(record: dict, name: str) -> tuple[str, str]:
    classes, steps = record["classes"], record["steps"]
    labels = f"class_labels=[i % {classes} for i in range(10)]"
    call = record.get("call", {"num_inference_steps": steps})
    family = _family(record)
    arguments = labels if family.needs_classes else "batch_size=10" + f", {labels}" * (classes > 0)
    arguments += "".join(f", {key}={value!r}" for key, value in call.items())
    imports, dtype = _dtype(record)
    code = f"""{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{dtype})  # the path of this folder
images = pipe({arguments}).images
images[0].save("sample.png")"""
    measured = "the numbers below were measured there." if record["metrics"] else "`distill verify` draws that many."
    reason = measured if steps > 16 else "it was trained on these times only."
    advice = f"Sample with exactly {steps} step{'s' * (steps != 1)}: {reason}"
    if family.no_guidance:
        kept = ", ".join(f"`{key}={value}`" for key, value in family.no_guidance.items())
        advice += (
            f" Keep {kept}: by default `{family.label_pipeline}` guides with class 1000, which this model does not have"
            + (", and its guidance is in the weights already." if is_guided(record) else ".")
        )
    return code, advice


def _dtype(record: dict) -> tuple[str, str]:
    """The import, and the argument of `from_pretrained`, that load weights in half precision as they are."""
    if record.get("dtype", "float32") == "float32":
        return "", ""
    return "import torch\n", f", dtype=torch.{record['dtype']}"


def _text(record: dict, name: str) -> tuple[str, str]:
    call = "".join(f", {key}={value!r}" for key, value in record["call"].items())
    draw = f'pipe("a cat on a sofa"{call})'
    video = pipeline_tag(record) == "text-to-video"
    code = f"{_load(record, name)}\n" + (
        f"frames = {draw}.frames[0]" if video else f'{draw}.images[0].save("sample.png")'
    )
    if not record["call"]:
        return code, f"The defaults of `{record['pipeline']}` are those of this student: no argument is needed."
    names = ", ".join(f"`{key}`" for key in record["call"])
    return code, (
        f"Pass {names} as shown: the defaults of `{record['pipeline']}` are for another number of steps or for a guided "
        "teacher. `distill.json` has the same arguments under `call`."
    )


def _load(record: dict, name: str) -> str:
    """Lines that leave the pipeline as `pipe`."""
    torch_import, dtype = _dtype(record)
    if record["kind"] == "pipeline":
        imports = f"{torch_import}from diffusers import DiffusionPipeline"
        return f'{imports}\n\npipe = DiffusionPipeline.from_pretrained("{name}"{dtype})'
    base, scheduler, network, part = (record[key] for key in ("base", "scheduler", "network", "part"))
    scheduler_line = f'scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")'
    variant = f', variant="{record["variant"]}"' if record.get("variant") else ""
    pipe_line = f'pipe = DiffusionPipeline.from_pretrained("{base}", scheduler=scheduler{variant}{dtype})'
    if record["kind"] == "single-file":
        imports = f"{torch_import}from diffusers import DiffusionPipeline, {scheduler}, {network}\n"
        where = f'config="{base}", subfolder="{part}"{dtype.replace("dtype", "torch_dtype")}'
        load = f'{network}.from_single_file("{name}/{record["file"]}", {where})'
        return "\n".join([imports, scheduler_line, pipe_line, f"pipe.{part} = {load}"])
    imports = [f"{torch_import}from diffusers import DiffusionPipeline, {scheduler}", ""]
    load = f'pipe.load_lora_weights("{name}", weight_name="{record["files"][0]}")'
    if record["files"][0].startswith("adapter"):  # peft's file, for a pipeline that loads no LoRA
        imports = [imports[0], "from peft import PeftModel\n"]
        load = f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{name}").merge_and_unload()'
    return "\n".join([*imports, scheduler_line, pipe_line, load])


def _onnx(record: dict, name: str) -> tuple[str, str]:
    noise = '"noise": np.float32(np.random.randn(*x.shape)), ' if record["sampler"] == "renoise" else ""
    imports, conditions = "import numpy as np, onnxruntime", "cond = {}"
    if record["conditions"]:
        imports += "\nfrom safetensors.numpy import load_file"
        conditions = (
            f'stored = load_file("{name}/reference.safetensors")  # put your own in place of these\n'
            f"cond = {{key: stored[key][:1] for key in {record['conditions']}}}"
        )
    shape = str(record["shape"])[1:-1]
    code = f"""{imports}

step, x = onnxruntime.InferenceSession("{name}/{record["file"]}"), np.float32(np.random.randn(1, {shape}))
{conditions}
for t, s in zip({record["times"][:-1]}, {record["times"][1:]}):
    x = step.run(["x_s"], {{"x_t": x, "t": np.float32([t]), "s": np.float32([s]), {noise}**cond}})[0]"""
    inside = "Schedule, prediction type and guidance" if is_guided(record) else "Schedule and prediction type"
    return code, f"{inside} are inside the graph; the output `x` is E[x | x_t]."
