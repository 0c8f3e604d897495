"""Building by name, and reading weights: strict, and never by unpickling code."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from dynakern import create_model, list_models, load_official, model_info
from dynakern.models import read_state_dict


def small(**overrides):
    return create_model("s4d_classifier", d_model=4, d_state=4, num_layers=1, **overrides)


def test_names_and_overrides():
    assert "s4d_classifier" in list_models("s4d*")
    assert small(num_classes=3).decoder.out_features == 3
    info = model_info("s4d_classifier")
    assert info["system"] == "s4d"
    assert info["signature"] == "s4d_classifier(**overrides: 'Any') -> 'S4DModel'"
    with pytest.raises(ValueError, match="Did you mean 's4d_classifier'"):
        create_model("s4d_clasifier")
    with pytest.raises(TypeError, match="d_modle"):
        create_model("s4d_classifier", d_modle=4)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
def test_reads_safetensors_and_torch_files(tmp_path, wrapped):
    torch.manual_seed(0)
    donor, model = small(), small()
    state = donor.state_dict()
    torch.save(state if wrapped is None else {wrapped: state, "epoch": 3}, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for source in (tmp_path / "a.pt", str(tmp_path / "a.safetensors"), state):
        torch.nn.init.zeros_(model.encoder.weight)
        assert load_official(model, source) is model
        assert torch.equal(model.encoder.weight, donor.encoder.weight)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_are_refused_without_running(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"weight": Evil()}))
    for name in ("evil.pt", "plain.pkl"):
        with pytest.raises(ValueError, match="without unpickling arbitrary code"):
            read_state_dict(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        load_official(small(), tmp_path / "nothing.pt")
    state = small().state_dict()
    extra = {**state, "more": torch.zeros(1)}
    del extra["encoder.bias"]
    with pytest.raises(ValueError, match=r"missing: encoder\.bias; left over: more"):
        load_official(small(), extra)
    with pytest.raises(ValueError, match=r"encoder\.weight is \(2, 2\), needs \(4, 1\)"):
        load_official(small(), {**state, "encoder.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="these entries are none: note"):
        load_official(small(), {**state, "note": "hello"})
