"""Text encoders on tiny random T5, CLIP and Qwen models, saved to a folder and loaded by the real classes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe.pretrained import TextEncoder

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "of", "the", "sea"]
PROMPTS = ["a red cat", "", "the green house of the blue sea", "dog", "ein Käse, 漢字 🙂"]


def word_tokenizer(special: dict[str, str], end: str = "") -> "transformers.PreTrainedTokenizerFast":
    """One token a word; `special`: the tokens' roles; `end` closes every prompt."""
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(special.values()), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_t5(folder: Path, seed: int = 0) -> str:
    """A whole T5, decoder included, as it is published."""
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    word_tokenizer(special, end="</s>").save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path, whole: bool) -> str:
    """CLIP's text model alone, or with the image model."""
    torch.manual_seed(0)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{word[-1]}</w>" for word in WORDS), "c", "a", "ca"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*vocabulary, "cat</w>", "t</w>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = transformers.CLIPTokenizer(folder / "vocab.json", folder / "merges.txt")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    if whole:
        image = {**sizes, "image_size": 8, "patch_size": 4}
        config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)
    else:
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)).save_pretrained(folder)
    return str(folder)


def save_qwen(folder: Path) -> str:
    """A decoder whose tokenizer adds nothing to a prompt and has no token for padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=32, num_key_value_heads=1, **sizes)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    word_tokenizer({"eos_token": "<|end|>", "unk_token": "<unk>"}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "t5": save_t5(root / "t5"),
        "clip": save_clip(root / "clip", whole=False),
        "whole clip": save_clip(root / "whole_clip", whole=True),
        "qwen": save_qwen(root / "qwen"),
    }


KINDS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "whole clip": "CLIPTextModel", "qwen": "Qwen2Model"}
LENGTHS = {"t5": [4, 1, 8, 2], "qwen": [3, 1, 7, 1]}  # words, and T5's end; CLIP's tokenizer knows pieces


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_are_the_last_hidden_state_of_each_prompt_alone(folders, name):
    encoder = TextEncoder(folders[name], 10, "cpu")
    assert type(encoder.model).__name__ == KINDS[name]
    text, lengths = encoder.encode(PROMPTS)
    assert text.shape == (5, 10, encoder.width) and text.dtype == np.float16 and lengths.dtype == np.int64
    assert lengths[:4].tolist() == LENGTHS.get(name, lengths[:4].tolist()) and lengths.min() >= 1
    for prompt, found, length in zip(PROMPTS, text, lengths, strict=True):
        assert (found[length:] == 0).all() and (found[:length] != 0).any(1).all()
        ids = encoder.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=10)["input_ids"]
        if not ids.numel():
            ids = torch.tensor([[encoder.tokenizer.eos_token_id]])
        with torch.inference_mode():
            alone = encoder.model(input_ids=ids.long()).last_hidden_state[0]  # neither padded nor masked
        np.testing.assert_allclose(found[:length], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_batches_show_in_rounding_only_and_the_same_batch_gives_the_same_bytes(folders, name):
    encoder = TextEncoder(folders[name], 10, "cpu")
    prompts = PROMPTS * 9  # two batches
    text, lengths = encoder.encode(prompts)
    again = TextEncoder(folders[name], 10, "cpu").encode(prompts)
    assert text.tobytes() == again[0].tobytes() and lengths.tobytes() == again[1].tobytes()
    for i in range(5):
        one, length = encoder.encode([PROMPTS[i]])
        assert length == lengths[i] == lengths[40 + i]
        for other in (text[i], text[40 + i]):
            np.testing.assert_allclose(one[0], other, rtol=2e-3, atol=2e-3)


def test_clip_brackets_a_prompt_and_keeps_its_end_when_it_is_cut(folders):
    encoder = TextEncoder(folders["clip"], 4, "cpu")
    _, lengths = encoder.encode(["", "cat", "cat cat", "cat cat cat cat"])
    assert lengths.tolist() == [2, 3, 4, 4] and encoder.cut == 1
    ids, _ = encoder._tokenize(["cat cat cat cat"])
    assert ids[0, 0] == 0 and ids[0, -1] == 1
    encoder.encode(["cat cat cat"] * 3)
    assert encoder.cut == 1 + 1 + 3


def test_t5_saved_as_an_encoder_alone_gives_the_same(folders, tmp_path):
    whole = TextEncoder(folders["t5"], 10, "cpu")
    whole.model.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    part = TextEncoder(str(tmp_path), 10, "cpu")
    assert type(part.model).__name__ == "T5EncoderModel" and part.sha256 != whole.sha256
    np.testing.assert_array_equal(part.encode(PROMPTS)[0], whole.encode(PROMPTS)[0])


def test_hash_is_of_weights_and_tokenizer_and_nothing_else(folders, tmp_path):
    first = TextEncoder(save_t5(tmp_path / "a"), 10, "cpu")
    assert first.sha256 == TextEncoder(folders["t5"], 8, "cpu").sha256
    (tmp_path / "a" / "README.md").write_text("mine")
    assert TextEncoder(str(tmp_path / "a"), 10, "cpu").sha256 == first.sha256
    assert TextEncoder(save_t5(tmp_path / "b", seed=1), 10, "cpu").sha256 != first.sha256
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    assert TextEncoder(str(tmp_path / "a"), 10, "cpu").sha256 != first.sha256


def _pickled(folder: Path) -> str:
    weights = transformers.T5EncoderModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return "safetensors"


def _incomplete(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "its weights lack encoder.final_layer_norm.weight"


def _foreign_code(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this must not run')")
    return "trust_remote_code"


@pytest.mark.parametrize("damage", [_pickled, _incomplete, _foreign_code])
def test_what_cannot_be_loaded_safely_and_whole_is_one_line(tmp_path, damage):
    folder = save_t5(tmp_path / "t5")
    message = damage(tmp_path / "t5")
    with pytest.raises(ValueError, match=f"^cannot load {folder} on cpu: ") as caught:
        TextEncoder(folder, 10, "cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_impossible_lengths_and_values_are_refused(folders, tmp_path):
    for name, tokens, message in (("clip", 13, "takes 3 to 12 tokens, not 13"), ("t5", 1, "2 to 65536")):
        with pytest.raises(ValueError, match=message):
            TextEncoder(folders[name], tokens, "cpu")
    encoder = TextEncoder(save_t5(tmp_path), 10, "cpu")
    encoder.model.encoder.final_layer_norm.weight.data[0] = 1e9
    for dtype in (torch.float32, torch.bfloat16):  # which has no 65504
        encoder.model.to(dtype)
        assert (np.abs(encoder.encode(PROMPTS)[0][:, 0, 0]) == 65504).all()
    encoder.model.encoder.final_layer_norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN for 'a red cat'"):
        encoder.encode(PROMPTS)


def test_without_transformers_it_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'terminal-velocity\[text\]'"):
        TextEncoder(folders["t5"], 10, "cpu")
