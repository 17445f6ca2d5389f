"""What is special to the orthogonal, sparse and spectral rows: sizes that must fit, settings that peft would drop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.boft.layer import FastBlockDiag

from autopeft.backends.hf.base_model import BaseModel, make_base
from autopeft.backends.hf.build import build_trial_model, count_trainable, trainable_parameters
from autopeft.backends.hf.peft_stand_ins import install_block_diagonal
from autopeft.backends.hf.saved import merge_adapter
from autopeft.backends.hf.steps import build_optimizer, train_step
from autopeft.errors import SpecError
from autopeft.methods import METHODS
from autopeft.methods.base import BuildContext, PeftCall
from autopeft.methods.orthogonal import ORTHOGONAL, check_divides
from autopeft.methods.sparse_spectral import SPARSE_SPECTRAL
from autopeft.records import TrialSpec
from autopeft.testing.subject import compute_logits, compute_loss
from autopeft.testing.tiny_models import tiny_base, tiny_batch

MakeSpec = Callable[..., TrialSpec]
QUERY = "encoder.layer.0.attention.self.query"
OUTPUT = "encoder.layer.0.output.dense"


def make_context(*sizes: tuple[int, int], transposed: bool = False) -> BuildContext:
    names = (QUERY, OUTPUT)[: len(sizes)]
    return BuildContext(
        targets=("query", "output.dense"),
        roles={"value": ["v"], "qkv": []},
        head=("classifier",),
        sizes=dict(zip(names, sizes, strict=True)),
        transposed=transposed,
    )


def call(spec: TrialSpec, context: BuildContext) -> PeftCall:
    peft = METHODS[spec.method].peft
    assert peft is not None
    return peft(spec, context)


# --- sizes that must fit


@pytest.mark.parametrize(
    ("method", "settings", "sizes", "words"),
    [
        ("oft", {"block_size": 64}, [(96, 96)], rf"oft.block_size .* is 64 for {QUERY} \(96\). Use 32 or less"),
        ("oft", {"block_size": 32}, [(64, 64), (90, 64)], rf"is 32 for {OUTPUT} \(90\). No size offered does"),
        ("boft", {"block_size": 16, "butterfly_factors": 3}, [(96, 96)], r"is 64 for .* \(96\). Use 32 or less"),
        ("c3a", {"block_size": 64}, [(64, 96)], rf"is 64 for {QUERY}'s outputs \(96\). Use 32 or less"),
        ("psoft", {"rank": 65}, [(64, 128)], r"psoft.rank .* is 65 .* \(64 x 128\). Use 64 or less"),
        ("fourierft", {"num_frequencies": 4097}, [(64, 64)], "fourierft.num_frequencies .* 4097 of the 4096 of"),
        ("waveft", {"num_coefficients": 4097}, [(64, 64)], "waveft.num_coefficients .* 4097 of the 4096 of"),
        # 33 x (64 + 64) = 4224 places in 64 x 64 = 4096 weights.
        ("shira", {"rank": 33}, [(64, 64)], "shira.rank .* 4224 of the 4096 of"),
        ("supertuning", {"density": 0.001}, [(8, 8)], "0.001 of .*'s 64 leaves none. Use 0.02 or more"),
        ("road", {}, [(64, 64), (64, 63)], f"in pairs, but {OUTPUT} has 63"),
    ],
)
def test_what_does_not_fit_a_target_is_refused_by_its_name(
    make_spec: MakeSpec, method: str, settings: dict[str, object], sizes: list[tuple[int, int]], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        call(make_spec(method, settings=settings), make_context(*sizes))


@given(
    st.sampled_from([4, 8, 16, 32, 64]),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40).map(lambda n: 4 * n), min_size=1),
)
def test_blocks_pass_exactly_where_they_divide_every_width(block: int, widths: dict[str, int]) -> None:
    if all(width % block == 0 for width in widths.values()):
        check_divides("block_size", block, (4, 8, 16, 32, 64), widths)
    else:
        with pytest.raises(SpecError) as refusal:
            check_divides("block_size", block, (4, 8, 16, 32, 64), widths)
        # Every width is a multiple of 4, so that something offered always fits, and it is what the message says.
        advised = int(str(refusal.value).rsplit("Use ", 1)[1].split()[0])
        check_divides("block_size", advised, (), widths)


@pytest.mark.parametrize(("outputs", "group_size"), [((64, 128), 64), ((64, 96), 32), ((64, 90), 2)])
def test_road_groups_as_many_outputs_as_every_target_allows(
    make_spec: MakeSpec, outputs: tuple[int, int], group_size: int
) -> None:
    context = make_context(*[(64, width) for width in outputs])
    assert call(make_spec("road"), context).arguments["group_size"] == group_size


@pytest.mark.parametrize(
    "method", [m.name for m in (*ORTHOGONAL, *SPARSE_SPECTRAL) if m.name not in ("fourierft", "waveft")]
)
def test_gpt2s_transposed_layers_are_refused_where_peft_has_no_adapter_for_them(
    make_spec: MakeSpec, method: str
) -> None:
    with pytest.raises(SpecError, match="Conv1D, as in GPT-2"):
        call(make_spec(method), make_context((64, 64), transposed=True))


# --- settings that must reach the model


def test_boft_has_as_many_rotations_as_butterfly_factors(make_spec: MakeSpec) -> None:
    # Without its CUDA kernel peft would train one factor, whatever is asked.
    model = build_trial_model(tiny_base("bert", 32), make_spec("boft", settings={"butterfly_factors": 3}))
    rotations = [p for name, p in trainable_parameters(model).items() if "boft_R" in name]
    assert rotations
    assert {len(rotation) for rotation in rotations} == {3}


@pytest.fixture(scope="module")
def wide_bert() -> BaseModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=96, pad_token_id=0)
    return make_base(transformers.AutoModelForSequenceClassification.from_config(config).requires_grad_(False), 32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "block_size", "count"),
    [
        # Half a skew-symmetric matrix a block: 5 layers of 256 inputs have 2 blocks, one of 512 has 4.
        ("oft", 128, (5 * 2 + 4) * 128 * 127 // 2),
        # A vector a circulant block: 4 layers of 256 x 256, and two of 256 x 512.
        ("c3a", 128, 4 * 2 * 2 * 128 + 2 * 2 * 4 * 128),
        ("c3a", 256, 4 * 256 + 2 * 2 * 256),
    ],
)
def test_the_largest_blocks_train_and_merge_on_a_model_that_is_wide_enough(
    method: str, block_size: int, count: int, wide_bert: BaseModel, make_spec: MakeSpec
) -> None:
    spec = make_spec(method, settings={"block_size": block_size})
    model = build_trial_model(wide_bert, spec)
    assert count_trainable(model, wide_bert.head).adapter == count
    before = compute_loss(model)
    optimizer = build_optimizer(model, spec)
    model.train()
    for _ in range(10):
        train_step(model, optimizer, tiny_batch(), learning_rate=3e-3, device="cpu")
    assert compute_loss(model) < before
    logits = compute_logits(model)
    merged = merge_adapter(copy.deepcopy(model))
    torch.testing.assert_close(compute_logits(merged), logits, rtol=0, atol=1e-4)


def test_bofts_block_diagonal_and_its_gradient_are_those_of_pytorch() -> None:
    install_block_diagonal()
    blocks_NDHH = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 12, 12, dtype=torch.float64)
    for factor in range(2):
        for block in range(3):
            corner = slice(4 * block, 4 * block + 4)
            expected[factor, corner, corner] = blocks_NDHH[factor, block].detach()
    assert torch.equal(FastBlockDiag.apply(blocks_NDHH), expected)
    assert torch.autograd.gradcheck(FastBlockDiag.apply, (blocks_NDHH,))


def test_supertuning_adds_a_low_rank_part_only_where_it_has_a_rank(make_spec: MakeSpec) -> None:
    alone = call(make_spec("supertuning"), make_context((64, 64))).arguments
    both = call(make_spec("supertuning", settings={"rank": 4}), make_context((64, 64))).arguments
    assert "r" not in alone
    assert (both["r"], both["lora_alpha"]) == (4, 8.0)


@pytest.mark.parametrize("method", ["fourierft", "waveft", "shira"])
def test_places_are_drawn_from_the_trials_seed(make_spec: MakeSpec, method: str) -> None:
    seeds = [call(make_spec(method, seed=seed), make_context((64, 64))).arguments for seed in (0, 7)]
    key = "random_seed" if method == "shira" else "random_loc_seed"
    assert [arguments[key] for arguments in seeds] == [0, 7]


def test_the_frequencies_of_another_seed_lie_elsewhere(make_spec: MakeSpec) -> None:
    places = []
    for seed in (0, 0, 7):
        model = build_trial_model(tiny_base("bert", 32), make_spec("fourierft", seed=seed))
        layer = next(module for module in model.modules() if hasattr(module, "fourierft_spectrum"))
        places.append(layer.indices["default"].tolist())
    assert places[0] == places[1] != places[2]


def test_osf_leaves_the_main_directions_of_a_weight_alone(make_spec: MakeSpec) -> None:
    model = build_trial_model(tiny_base("bert", 32), make_spec("osf", settings={"preserved_share": 0.5}))
    layer: Any = next(m for m in model.modules() if hasattr(m, "osf_svd_params"))
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_batch()).loss.backward()
        optimizer.step()
    weight = layer.base_layer.weight.detach()
    change = layer.get_delta_weight("default").detach()
    left, _, right = torch.linalg.svd(weight)
    kept = len(weight) // 2
    assert change.abs().max() > 1e-6
    assert (left[:, :kept].T @ change @ right[:kept].T).abs().max() < 1e-6
