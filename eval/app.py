"""A page to play with: `python -m eval.app WEIGHTS`, then open the address that it prints in a browser.

It shows the controls that the weights have, begins with what they were trained or finished for, and draws
anew whenever one of them is moved. It is served to this machine alone, by gradio:
pip install 'terminal-velocity[app]'.
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from random import randrange
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import command_line
from recipe import load
from recipe.generator import Generator, usual_steps

if TYPE_CHECKING:
    import gradio

SEEDS = 2**31
SIDE = 128  # pixels that a picture has at least on the page


def draw(model: Generator, asked: dict[str, Any]) -> tuple[list[np.ndarray], str]:
    """Return pictures (H, W) or (H, W, 3), enlarged by a whole number, and a line with the time they took.

    asked: values of `controls`, by their names. Raises ValueError, FloatingPointError.
    """
    asked = dict(asked)
    if "start" in asked:
        asked["interval"] = asked.pop("start"), asked.pop("end")
    if not asked.get("labels", True):
        asked["labels"] = "none"
    other = asked.pop("other")
    asked["interpolate"] = other if asked["interpolate"] else None
    began = perf_counter()
    images = model.sample(**asked)
    took = perf_counter() - began
    scale = max(1, SIDE // images.shape[1])
    pictures = [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images]
    each = f"{1000 * took / len(images):.1f} ms a picture, {len(images)} in {took:.2f} s"
    return [x.repeat(scale, 0).repeat(scale, 1) for x in pictures], f"{each} on {model.device.type}"


def slider(label: str, low: float, high: float, value: float, step: float) -> tuple[str, dict[str, Any]]:
    """Return a control of a number in a range."""
    return "Slider", {"label": label, "minimum": low, "maximum": high, "value": value, "step": step}


def controls(model: Generator) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the controls that these weights have: components of gradio and their options, by what they set.

    That is an argument of `Generator.sample`, or `start` and `end` of its interval; `interpolate` says
    whether to, and `other` to which seed.
    """
    config, steps, (low, high) = model.net.config, usual_steps(model.facts), model.objective.guidance_range
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if model.prompts is not None:
        found["prompts"] = "Textbox", {"label": "Prompt", "value": ""}
    if config.classes:
        names = [*map(str, model.class_names or range(config.classes)), "none"]
        several = model.prompts is None
        about = {"label": "Classes, a row of each" if several else "Class", "multiselect": several}
        found["labels"] = "Dropdown", {**about, "choices": names, "value": names[:1] if several else names[0]}
    found["nfe"] = slider("Steps", 1, max(8, 2 * steps), steps, 1)
    if low < high:
        top = max(8.0 if high == math.inf else high, model.w)
        found["w"] = slider("Guidance w", max(min(low, model.w), 0.05), top, model.w, 0.05)
    if config.interval and model.objective.auxiliary:
        start, end = model.interval or (0.0, 1.0)
        found["start"] = slider("Guided from t =", 0, 1, start, 0.01)
        found["end"] = slider("to t =", 0, 1, end, 0.01)
    found["n"] = slider("Pictures in a row", 1, 16, 8, 1)
    found["seed"] = "Number", {"label": "Seed", "value": 0, "precision": 0}
    found["interpolate"] = "Checkbox", {"label": "Interpolate to another seed"}
    found["other"] = "Number", {"label": "Other seed", "value": 1, "precision": 0}
    return found


def page(model: Generator, title: str) -> gradio.Blocks:
    """Return the page: controls on the left, pictures on the right."""
    import gradio as gr

    names = controls(model)

    def answer(*values: Any) -> tuple[gr.Gallery, str]:  # noqa: ANN401
        asked = dict(zip(names, values, strict=True))
        try:
            pictures, said = draw(model, asked)
        except (ValueError, FloatingPointError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        return gr.Gallery(pictures, columns=int(asked["n"])), said

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {title}\n{model.objective.name}, step {model.facts['step']}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                parts = {name: getattr(gr, kind)(**options) for name, (kind, options) in names.items()}
                with gr.Row():
                    other = gr.Button("New seed", min_width=80)
                    again = gr.Button("Draw", variant="primary", min_width=80)
            with gr.Column(scale=3):
                gallery = gr.Gallery(show_label=False, format="png", object_fit="contain", height="auto")
                said = gr.Markdown()
        events = {"Slider": "release", "Dropdown": "input", "Checkbox": "input"}
        changes = [getattr(part, events.get(names[name][0], "submit")) for name, part in parts.items()]
        how = answer, list(parts.values()), [gallery, said]
        gr.on([blocks.load, again.click, *changes], *how, trigger_mode="always_last", concurrency_id="draw")
        other.click(lambda: randrange(SEEDS), None, parts["seed"]).then(*how, concurrency_id="draw")
    return blocks


def serve(blocks: gradio.Blocks, host: str, port: int | None) -> str:
    """Start to serve a page, and return its address. Raises OSError where the port is taken."""
    how = {"share": False, "quiet": True, "footer_links": [], "ssr_mode": False, "prevent_thread_lock": True}
    return blocks.launch(server_name=host, server_port=port, **how)[1]


def main(arguments: list[str]) -> None:
    """Run the command line: serve the page until it is interrupted."""
    parser = command_line("eval.app", __doc__)
    add = parser.add_argument
    add("weights", help="NAME, NAME.json or NAME.safetensors; of a folder of weights the newest is taken")
    add("--host", default="127.0.0.1", help="address to serve at (default: %(default)s; 0.0.0.0: everyone)")
    add("--port", type=int, help="port to serve at (default: the first free one from 7860)")
    add("--vae", help="folder of an autoencoder of diffusers, for latents (default: as the weights say)")
    add("--text-encoder", help="folder or hub name, for stored embeddings (default: as the weights say)")
    options = parser.parse_args(arguments)
    if find_spec("gradio") is None:
        parser.error("the page needs gradio: pip install 'terminal-velocity[app]'")
    if options.port is not None and not 0 < options.port < 2**16:
        parser.error(f"--port: {options.port} must be from 1 to 65535")
    try:
        model = load(options.weights, vae=options.vae, text_encoder=options.text_encoder)
        blocks = page(model, f"{Path(options.weights).resolve().parent.name}/{Path(options.weights).name}")
        address = serve(blocks, options.host, options.port)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    blocks.block_thread()


if __name__ == "__main__":
    main(sys.argv[1:])
