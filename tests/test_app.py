"""The page to play with: what is behind its controls, the page itself, and the page in a browser."""

import re
import shutil

import numpy as np
import pytest
import torch

from eval import app
from recipe import load
from recipe.dit import DiT, DiTConfig
from recipe.mit import MiT, MiTConfig
from recipe.text import TextConfig
from recipe.weights import save_weights


def weights(folder, kind=DiT, method=None, finished=(), **options):
    """Weights of a small network of pixels whose output is not zero."""
    torch.manual_seed(0)
    config = {DiT: DiTConfig, MiT: MiTConfig}[kind](
        **{"size": 4, "channels": 1, "width": 32, "heads": 2, **options}
    )
    net = kind(config)
    state = {name: x + 0.2 * torch.randn_like(x) for name, x in net.state_dict().items()}
    facts = {"method": method or {"objective": "tvm", "guidance": 2.0}, "average": "ema", "step": 7}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [63.75], "class_names": ["cat", "dog"]}
    save_weights(
        folder / "w", state, net.config, {**facts, **({"finished": list(finished)} if finished else {})}
    )
    return load(folder / "w", device="cpu")


def values(model, **changes):
    """What the controls hold when the page opens, but for the changes."""
    return {name: options.get("value", False) for name, (_, options) in app.controls(model).items()} | changes


ALWAYS = ["nfe", "n", "seed", "interpolate", "other"]


def test_controls_are_those_that_the_weights_have_and_begin_as_they_were_trained(tmp_path):
    model = weights(tmp_path, classes=2, depth=1)
    assert list(app.controls(model)) == ["labels", *ALWAYS]  # trained at one w
    assert app.controls(model)["labels"][1]["choices"] == ["cat", "dog", "none"]
    text = TextConfig(tokens=8, width=32)
    model = weights(
        tmp_path, method={"objective": "tvm", "guidance": [1.0, 4.0]}, classes=0, depth=1, text=text
    )
    assert list(app.controls(model)) == ["prompts", "nfe", "w", *ALWAYS[1:]]
    model = weights(tmp_path, method={"objective": "flow_matching"}, classes=2, depth=1)
    assert app.controls(model)["nfe"][1] | {"value": 50, "maximum": 100} == app.controls(model)["nfe"][1]
    assert app.controls(model)["w"][1]["maximum"] == 8
    how = {"extractor": "pixels", "nfe": 2, "w": 5.0, "interval": [0.25, 0.5]}
    options = {
        "method": {"objective": "imf", "guidance": [1.0, 8.0]},
        "classes": 2,
        "depth": 2,
        "head_depth": 1,
    }
    model = weights(tmp_path, MiT, finished=[how], **options)
    found = {
        name: options["value"] for name, (_, options) in app.controls(model).items() if name != "interpolate"
    }
    assert list(found) == ["labels", "nfe", "w", "start", "end", "n", "seed", "other"]
    assert [found[name] for name in ("nfe", "w", "start", "end")] == [2, 5.0, 0.25, 0.5]
    pictures, _ = app.draw(model, values(model, start=0, end=1, nfe=1, n=2))
    assert np.array_equal(pictures[1][::32, ::32], model.sample("cat", n=2, interval=(0, 1))[1, ..., 0])


def test_what_is_drawn_is_what_sample_draws(tmp_path):
    model = weights(tmp_path, classes=2, depth=1)
    pictures, said = app.draw(model, values(model, labels=["dog", "none"], n=3, nfe=2, seed=5))
    wanted = model.sample(["dog", "none"], n=3, nfe=2, seed=5)
    assert np.array_equal(np.stack(pictures)[:, ::32, ::32, None], wanted)
    assert pictures[0].shape == (128, 128)
    assert re.fullmatch(r"[\d.]+ ms a picture, 6 in [\d.]+ s on cpu", said)
    row, _ = app.draw(model, values(model, n=3, interpolate=True, other=9))
    ends = [model.sample("cat", n=1, seed=seed)[0, ..., 0] for seed in (0, 9)]
    assert np.array_equal([row[0][::32, ::32], row[2][::32, ::32]], ends)
    assert np.array_equal(
        app.draw(model, values(model, labels=[]))[0], app.draw(model, values(model, labels="none"))[0]
    )
    with pytest.raises(ValueError, match="^interpolate: 1 is the seed that the rows start from$"):
        app.draw(model, values(model, seed=1, interpolate=True))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        app.main(["nowhere"])
    assert capsys.readouterr().err.endswith(
        "error: the page needs gradio: pip install 'terminal-velocity[app]'\n"
    )


def test_a_port_that_cannot_be_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: True)
    with pytest.raises(SystemExit):
        app.main(["nowhere", "--port", "65536"])
    assert capsys.readouterr().err.endswith("error: --port: 65536 must be from 1 to 65535\n")


@pytest.mark.slow
def test_the_page_has_these_controls_and_says_what_is_wrong(tmp_path):
    gr = pytest.importorskip("gradio")
    model = weights(tmp_path, classes=2, depth=1)
    page = app.page(model, "a title")
    shown = [block.label for block in page.blocks.values() if hasattr(block, "label") and block.label]
    assert [options["label"] for _, options in app.controls(model).values()] == [
        label for label in shown if label != "Samples"
    ]
    draws = next(fn for fn in page.fns.values() if len(fn.inputs) == len(app.controls(model)))
    gallery, said = draws.fn(*values(model, n=3).values())
    assert gallery.columns == 3 and "3 in " in said
    with pytest.raises(gr.Error, match="interpolate: 1 is the seed"):
        draws.fn(*values(model, seed=1, interpolate=True).values())


@pytest.fixture
def browser():
    """A headless browser: playwright's own, or the system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {error}"[:200])
        yield opened
        opened.close()


@pytest.mark.slow
def test_in_a_browser_pictures_are_drawn_at_once_and_anew_when_a_control_is_moved(tmp_path, browser):
    pytest.importorskip("gradio")
    page = app.page(weights(tmp_path, classes=2, depth=1), "a title")
    address = app.serve(page, "127.0.0.1", None)
    assert address.startswith("http://127.0.0.1:")
    try:
        tab, asked = browser.new_page(), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.set_default_timeout(120_000)
        tab.goto(address)
        tab.get_by_text("ms a picture, 8 in").wait_for()
        assert tab.locator(".thumbnail-item img").count() == 8
        tab.get_by_label("number input for Pictures in a row").fill("3")
        tab.get_by_role("button", name="Draw").click()
        tab.get_by_text("ms a picture, 3 in").wait_for()
        before = tab.locator(".thumbnail-item img").first.get_attribute("src")
        tab.get_by_label("Interpolate to another seed").check()
        tab.get_by_label("Seed", exact=True).fill("1")
        tab.get_by_role("button", name="Draw").click()
        tab.get_by_text("interpolate: 1 is the seed that the rows start from").first.wait_for()
        tab.get_by_role("button", name="New seed").click()
        tab.wait_for_function("old => document.querySelector('.thumbnail-item img')?.src != old", arg=before)
        outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert not outside, outside
    finally:
        page.close()
