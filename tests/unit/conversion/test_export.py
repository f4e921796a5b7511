"""What an export says and checks beyond the tensors."""

import json
import shutil

import pytest
import torch

from mmlm.checkpoint.manifest import Manifest
from mmlm.conversion.convert import megatron_to_hf
from mmlm.conversion.hf_config import read_combined
from mmlm.errors import CheckpointError
from tests.conversion_helpers import assert_equal, convert_in
from tests.tiny_weights import combined_state_dict, read_model_files


def test_a_checkpoint_without_huggingface_files_exports(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    directory = convert_in(parts, tmp_path / "ckpt")
    model = Manifest.read(directory).model
    shutil.rmtree(directory / "hf_assets")
    out = megatron_to_hf(load=directory, output=tmp_path / "out")
    assert read_combined(out).model == model
    assert_equal(read_model_files(out), combined_state_dict(parts))
    assert not (out / "tokenizer.model").exists()


def test_an_export_that_does_not_fit_its_manifest_is_refused(tmp_path, write_tiny_parts):
    directory = convert_in(write_tiny_parts(), tmp_path / "ckpt")
    file = directory / "mmlm.json"
    content = json.loads(file.read_text())
    content["model"]["vision"]["num_layers"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"stray: model.vision_model.decoder.layers.2"):
        megatron_to_hf(load=directory, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exported_llm_is_a_llama(tmp_path, write_tiny_parts):
    transformers = pytest.importorskip("transformers")
    parts = write_tiny_parts()
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", parts=True)
    ids = torch.arange(12)[None]
    logits = [
        transformers.LlamaForCausalLM.from_pretrained(folder / "llm").eval()(ids).logits
        for folder in (parts, out)
    ]
    assert torch.equal(*logits)
    # and out of the combined folder, as InternVLChatModel takes it from there
    config = json.loads((out / "config.json").read_text())["llm_config"]
    prefix = "language_model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_model_files(out).items()
        if name.startswith(prefix)
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    llama.load_state_dict(weights)
    assert torch.equal(llama(ids).logits, logits[0])
    tokenizer = transformers.LlamaTokenizer.from_pretrained(out)
    assert len(tokenizer) == config["vocab_size"]
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_generation_settings_of_the_llm_are_kept(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    (parts / "llm/generation_config.json").write_text('{"eos_token_id": 7}')
    convert_in(parts, tmp_path / "ckpt")
    out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 7}
