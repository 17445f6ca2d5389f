"""What is special to soft prompts: what peft is told, what trains beside the prompt, and which models take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autopeft.backends.hf.base_model import BaseModel, find_head, find_linear_names
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.errors import SpecError
from autopeft.methods import METHODS
from autopeft.methods.base import BuildContext, PeftCall
from autopeft.records import TrialSpec
from autopeft.testing.tiny_models import ArchitectureName, tiny_base, tiny_batch

MakeSpec = Callable[..., TrialSpec]
CONTEXT = BuildContext(targets=(), roles={}, head=("pre_classifier", "classifier"))


def call(spec: TrialSpec) -> PeftCall:
    peft = METHODS[spec.method].peft
    assert peft is not None
    return peft(spec, CONTEXT)


def trained_names(architecture: ArchitectureName, spec: TrialSpec) -> list[str]:
    return list(trainable_parameters(build_trial_model(tiny_base(architecture, 32), spec)))


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2", "p_tuning", "prompt_tuning", "cartridge"])
def test_the_whole_head_trains_beside_the_prompt(make_spec: MakeSpec, method: str) -> None:
    assert call(make_spec(method)).arguments["modules_to_save"] == ["pre_classifier", "classifier"]


def test_a_head_of_two_modules_trains_beside_the_prompt(make_spec: MakeSpec) -> None:
    # ModernBERT's head is `head` and `classifier`, of which peft knows the latter only.
    names = trained_names("modernbert", make_spec("prompt_tuning"))
    assert {name.split(".")[1] for name in names if name.startswith("base_model.")} == {"head", "classifier"}


def test_a_prefix_is_trained_through_a_network_only_where_asked(make_spec: MakeSpec) -> None:
    plain = call(make_spec("prefix_tuning")).arguments
    projected = call(make_spec("prefix_tuning", settings={"projection": True, "projection_size": 24})).arguments
    assert "encoder_hidden_size" not in plain
    assert (projected["prefix_projection"], projected["encoder_hidden_size"]) == (True, 24)


def test_the_prefixs_network_has_the_size_asked_for(make_spec: MakeSpec) -> None:
    spec = make_spec("prefix_tuning", settings={"projection": True, "projection_size": 24})
    model = build_trial_model(tiny_base("bert", 32), spec)
    shapes = [tuple(p.shape) for n, p in trainable_parameters(model).items() if "transform" in n and p.ndim == 2]
    # Tiny BERT: 64 wide, 2 layers with keys and values each.
    assert shapes == [(24, 64), (2 * 2 * 64, 24)]


@pytest.mark.parametrize(("encoder", "present", "absent"), [("mlp", "mlp_head", "lstm"), ("lstm", "lstm_head", "none")])
def test_p_tuning_trains_its_prompt_through_the_encoder_asked_for(
    make_spec: MakeSpec, encoder: str, present: str, absent: str
) -> None:
    names = trained_names("bert", make_spec("p_tuning", settings={"encoder": encoder}))
    assert any(present in name for name in names)
    assert not any(absent in name for name in names)


def test_a_prompt_from_the_vocabulary_starts_as_embeddings_of_words(make_spec: MakeSpec) -> None:
    base = tiny_base("bert", 32)
    model = build_trial_model(base, make_spec("prompt_tuning", settings={"init": "vocabulary"}))
    prompt = model.prompt_encoder["default"].embedding.weight
    words = base.model.get_input_embeddings().weight  # type: ignore[operator]
    assert all((words == vector).all(dim=1).any() for vector in prompt)


@pytest.mark.parametrize("frozen", [0, 3])
def test_a_cartridges_first_positions_stay_as_drawn(make_spec: MakeSpec, frozen: int) -> None:
    spec = make_spec("cartridge", settings={"num_virtual_tokens": 8, "num_frozen_tokens": frozen})
    model = build_trial_model(tiny_base("bert", 32), spec)
    sizes = [len(p) for name, p in trainable_parameters(model).items() if "prompt_encoder" in name]
    assert sizes == [8 - frozen]


@pytest.mark.parametrize(("target_modules", "layers"), [(None, {"0", "1"}), ("last-2", {"0", "1"}), ("last-1", {"1"})])
def test_llama_adapter_is_put_on_the_last_layers_asked_for(
    make_spec: MakeSpec, target_modules: str | None, layers: set[str]
) -> None:
    names = trained_names("llama", make_spec("adaption_prompt", target_modules=target_modules))
    assert {name.split(".layers.")[1].split(".")[0] for name in names if ".layers." in name} == layers


def test_llama_adapter_changes_nothing_before_its_gate_opens(make_spec: MakeSpec) -> None:
    base = tiny_base("llama", 32)
    adapted, alone = (build_trial_model(base, make_spec(m)).eval() for m in ("adaption_prompt", "head"))
    with torch.no_grad():
        assert torch.equal(adapted(**tiny_batch()).logits, alone(**tiny_batch()).logits)


def test_llama_adapter_is_refused_on_other_decoders(make_spec: MakeSpec) -> None:
    import transformers

    with torch.device("meta"):
        config = transformers.Qwen2Config(
            vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        model = transformers.Qwen2ForSequenceClassification(config)
        head = find_head(model)
        base = BaseModel(model=model, bits=32, head=head, linear_names=find_linear_names(model, head))
        with pytest.raises(SpecError, match="Llama, Mistral and GPT-2 only"):
            build_trial_model(base, make_spec("adaption_prompt"))
