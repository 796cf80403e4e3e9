"""The lines of a model card that load an export and draw from it, without this package."""

from __future__ import annotations

KINDS = {"pipeline": " for stock diffusers", "lora": " as a LoRA for stock diffusers and ComfyUI",
         "single-file": " as one file for stock diffusers and ComfyUI", "onnx": " as an ONNX graph"}
VIDEO = ("Wan", "CogVideoX", "LTX")


def task(record: dict) -> str:
    """The hub's name of what the model does."""
    if "call" not in record:
        return "unconditional-image-generation"
    return "text-to-video" if record["network"].startswith(VIDEO) else "text-to-image"


def usage(record: dict, name: str) -> tuple[str, str]:
    """Code that draws samples, and what is to be known of the call."""
    if record.get("kind") == "onnx":
        return _onnx(record, name)
    return _text(record, name) if "call" in record else _pixels(record, name)


def _pixels(record: dict, name: str) -> tuple[str, str]:
    classes, steps = record["classes"], record["steps"]
    labels = f"class_labels=[i % {classes} for i in range(10)]"
    first = "batch_size=10" + f", {labels}" * (classes > 0)
    if record.get("part") == "transformer":  # its pipeline guides by default; here guidance is in the weights
        first = f"{labels}, guidance_scale=1"
    code = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")  # the path of this folder
images = pipe({first}, num_inference_steps={steps}).images
images[0].save("sample.png")"""
    many = "the numbers below were measured there." if steps > 16 else "it was trained on these times only."
    return code, f"Ask for exactly {steps} step{'s' * (steps != 1)}: {many}"


def _text(record: dict, name: str) -> tuple[str, str]:
    call = "".join(f", {key}={value!r}" for key, value in record["call"].items())
    draw = f'pipe("a cat on a sofa"{call})'
    moving = task(record) == "text-to-video"
    code = f"{_load(record, name)}\n" + (f"frames = {draw}.frames[0]" if moving else f'{draw}.images[0].save("sample.png")')
    if not record["call"]:
        return code, f"The defaults of `{record['pipeline']}` are those of this student: a bare call is right."
    kept = ", ".join(f"`{key}`" for key in record["call"])
    return code, (f"Give {kept} as they stand: the defaults of `{record['pipeline']}` are code of diffusers and belong to "
                  "another number of steps or a guided teacher; `distill.json` holds the same as `call`.")


def _load(record: dict, name: str) -> str:
    """Lines that leave the pipeline as `pipe`."""
    base, scheduler, network = record["base"], record["scheduler"], record["network"]
    if record["kind"] == "pipeline":
        return f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{name}")'
    serve = f'scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")'
    pipe = f'pipe = DiffusionPipeline.from_pretrained("{base}", scheduler=scheduler)'
    if record["kind"] == "single-file":
        part, file = record["part"], record["file"]
        return "\n".join([
            f"from diffusers import DiffusionPipeline, {scheduler}, {network}\n", serve, pipe,
            f'pipe.{part} = {network}.from_single_file("{name}/{file}", config="{base}", subfolder="{part}")'])
    part, load = record["part"], f'pipe.load_lora_weights("{name}", weight_name="{record["files"][0]}")'
    peft = record["files"][0].startswith("adapter")  # its pipeline loads no LoRA
    if peft:
        load = f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{name}").merge_and_unload()'
    return "\n".join([f"from diffusers import DiffusionPipeline, {scheduler}", "from peft import PeftModel\n" if peft else "",
                      serve, pipe, load])


def _onnx(record: dict, name: str) -> tuple[str, str]:
    noise = '"noise": np.float32(np.random.randn(*x.shape)), ' if record["sampler"] == "renoise" else ""
    told = "cond = {}" if not record["told"] else f"cond = ...  # {', '.join(record['told'])}, as in reference.safetensors"
    code = f"""import numpy as np, onnxruntime

step, x = onnxruntime.InferenceSession("{name}/{record['file']}"), np.float32(np.random.randn(1, {str(record['shape'])[1:-1]}))
{told}
for t, s in zip({record['times'][:-1]}, {record['times'][1:]}):
    x = step.run(["x_s"], {{"x_t": x, "t": np.float32([t]), "s": np.float32([s]), {noise}**cond}})[0]"""
    return code, "Schedule, prediction and guidance are inside the graph; the output `x` is E[x | x_t]."
