"""Whatever is wrong with the files is said, and nothing is left under the final name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmlm.conversion.convert import hf_to_megatron, megatron_to_hf
from mmlm.errors import CheckpointError, MmlmError
from tests.conversion_helpers import convert_in, edit_safetensors
from tests.tiny_weights import PROJECTOR_FILE, read_model_files

INDEX = "model.safetensors.index.json"
LAYER = "encoder.layers.1."


class Code:
    """Pickles as a call of print."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must not run",)


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rename_tensors(parts: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("ls1", "mlp.fc1.bias"):
            tensors["other." + name] = tensors.pop(LAYER + name)

    edit_safetensors(parts / "vision", change)


def widen(parts: Path) -> None:
    edit_safetensors(parts / "vision", lambda t: t.update({LAYER + "ls1": torch.ones(41)}))


def double(parts: Path) -> None:
    content = (parts / "llm/model.safetensors").read_bytes()
    (parts / "llm/model-2.safetensors").write_bytes(content)


def truncate(parts: Path) -> None:
    file = parts / "llm/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_projector(parts: Path) -> None:
    file = parts / "vision" / PROJECTOR_FILE
    file.write_bytes(file.read_bytes()[:-100])


def index(parts: Path, file: str) -> None:
    names = read_model_files(parts / "llm")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": file}
    (parts / "llm" / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def code(parts: Path) -> None:
    torch.save({"0.weight": Code()}, parts / "vision" / PROJECTOR_FILE)


def vision_json(**changes: object) -> Callable[[Path], None]:
    return lambda parts: edit_json(parts / "vision/config.json", lambda c: c.update(changes))


def llm_json(**changes: object) -> Callable[[Path], None]:
    return lambda parts: edit_json(parts / "llm/config.json", lambda c: c.update(changes))


FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing and extra names": (
        rename_tensors,
        [
            "4 of 79 tensors do not fit the model",
            "missing: vision_model.encoder.layers.1.ls1 [40]",
            "missing: vision_model.encoder.layers.1.mlp.fc1.bias [80]",
            "stray: vision_model.other.ls1 [40] in",
            "stray: vision_model.other.mlp.fc1.bias [80] in",
        ],
    ),
    "wrong shape": (widen, ["wrong shape: vision_model.encoder.layers.1.ls1 is [41], the config"]),
    "duplicate names": (
        double,
        ["tensors are there twice: 'lm_head.weight' in model", "'model.norm.weight' in model"],
    ),
    "truncated shard": (truncate, ["llm/model.safetensors: the file cannot be read, is the file"]),
    "truncated projector": (truncate_projector, ["hermes_2_yi_34b.pth: the file cannot be read"]),
    "index to nowhere": (
        lambda parts: index(parts, "model-7.safetensors"),
        [f"{INDEX}: names model-7.safetensors, which is missing from"],
    ),
    "index out of the folder": (
        lambda parts: index(parts, "../vision/model.safetensors"),
        ["'../vision/model.safetensors' is not the name of a file beside the index"],
    ),
    "index to an absolute path": (
        lambda parts: index(parts, "/etc/passwd"),
        ["'/etc/passwd' is not the name of a file beside the index"],
    ),
    "code in a pickle": (
        code,
        ["_34b.pth: the file cannot be read: it holds code, which is"],
    ),
    "unknown vision architecture": (
        vision_json(model_type="clip_vision_model"),
        ["vision/config.json: model_type is 'clip_vision_model', only 'intern_vit_6b' is supp"],
    ),
    "unknown llm architecture": (
        llm_json(model_type="internlm2", architectures=["InternLM2ForCausalLM"]),
        ["llm/config.json: model_type is 'internlm2', only 'llama' is supported"],
    ),
    "unknown llm class": (
        llm_json(architectures=["MistralForCausalLM"]),
        ["architectures is ['MistralForCausalLM'], only ['LlamaForCausalLM'] is supported"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_leaves_nothing(tmp_path, write_tiny_parts, capsys, fault: str):
    parts = write_tiny_parts()
    damage, messages = FAULTS[fault]
    damage(parts)
    with pytest.raises(MmlmError) as caught:
        convert_in(parts, tmp_path / "ckpt")
    for message in messages:
        assert message in str(caught.value)
    assert not list(tmp_path.glob("ckpt/*"))
    assert "this must not run" not in capsys.readouterr().out


def damage_values(parts: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.layers.0.self_attn.k_proj.weight"][5, 7] = float("inf")

    edit_safetensors(parts / "llm", change)


def test_nan_is_a_warning_and_passes_unchanged(tmp_path, write_tiny_parts, caplog):
    parts = write_tiny_parts()
    damage_values(parts)
    with caplog.at_level(logging.WARNING, "mmlm"):
        convert_in(parts, tmp_path / "ckpt")
        out = megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    there, back = (record.getMessage() for record in caplog.records if "NaN" in record.msg)
    file = parts / "llm/model.safetensors"
    assert there.startswith("NaN or infinity in 2 tensors: 'language_model.model.layers.0.self_att")
    assert f"'language_model.model.norm.weight' in {file}" in there
    assert "'model.language_model.decoder.final_layernorm.weight' in" in back
    assert read_model_files(out)["language_model.model.norm.weight"].isnan().sum() == 1


def test_strict_refuses_nan_both_ways(tmp_path, write_tiny_parts):
    parts = write_tiny_parts()
    damage_values(parts)
    with pytest.raises(
        CheckpointError, match=r"llm/model\.safetensors: tensor '.*k_proj\.weight' h"
    ):
        convert_in(parts, tmp_path / "ckpt", strict=True)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        hf_to_megatron(llm=parts / "llm", output=tmp_path / "ckpt", strict=True)
    assert not list(tmp_path.glob("ckpt/*"))
    convert_in(parts, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out", strict=True)
    assert not list(tmp_path.glob("*out*"))


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path, write_tiny_parts):
    parts = write_tiny_parts(shards=2)
    file = parts / "llm" / INDEX
    entry = '"model.norm.weight": "model-00001-of-00002.safetensors",'
    file.write_text(file.read_text().replace('"weight_map": {', '"weight_map": {' + entry))
    with pytest.raises(
        CheckpointError, match=r"index\.json: names tensors twice: 'model\.norm\.wei"
    ):
        convert_in(parts, tmp_path / "ckpt")


def test_a_damaged_checkpoint_is_named_and_leaves_nothing(tmp_path, write_tiny_parts):
    convert_in(write_tiny_parts(), tmp_path / "ckpt")
    file = tmp_path / "ckpt/iter_0000000/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(
        CheckpointError, match=r"tensor 'model\.language_model\..*could not be read"
    ):
        megatron_to_hf(load=tmp_path / "ckpt", output=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
