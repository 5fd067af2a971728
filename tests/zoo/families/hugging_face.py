"""transformers: language models, encoders and vision models, by their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import kpflow_dyn as kp

from ..member import Member

TRIALS, TOKENS, WORDS, IMAGE = 2, 6, 29, 16
STATE_AXES = ("trial", "time", "unit")
SMALL = {  # most configurations take these names; the others have their own
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
PATCHES = {"image_size": IMAGE, "patch_size": 8, "num_channels": 3}


def text(model: str, state: str, **options: Any) -> Callable[[], kp.StaticProblem]:
    """The problem of a model on tokens."""

    def problem() -> kp.StaticProblem:
        config = getattr(hf, model).config_class(**{"pad_token_id": None} | options)
        net = getattr(hf, model)(config).double().eval()
        if hasattr(config, "num_local_experts"):
            net.set_experts_implementation("eager")  # the fast one knows no double precision
        tokens = torch.randint(WORDS, (TRIALS, TOKENS))
        return kp.StaticProblem(net, {"input_ids": tokens} | cacheless(config), state=state, axes=STATE_AXES)

    return problem


def cacheless(config: Any) -> dict[str, bool]:
    """Without the keys and values of before, of models that would keep them."""
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}


def language(model: str, **options: Any) -> Callable[[], kp.StaticProblem]:
    """The same with the logits as its state."""
    return text(model, "logits", **options)


def hidden(model: str, **options: Any) -> Callable[[], kp.StaticProblem]:
    """The same with the last hidden layer as its state."""
    return text(model, "last_hidden_state", **options)


def image(model: str, state: str = "last_hidden_state", **options: Any) -> Callable[[], kp.StaticProblem]:
    """The problem of a model on images."""

    def problem() -> kp.StaticProblem:
        net = getattr(hf, model)(getattr(hf, model).config_class(**options)).double().eval()
        pixels = torch.randn(TRIALS, 3, IMAGE, IMAGE, dtype=torch.float64)
        return kp.StaticProblem(net, {"pixel_values": pixels}, state=state)

    return problem


def encoded(model: str, **options: Any) -> Callable[[], kp.StaticProblem]:
    """An encoder and a decoder, each with tokens of its own."""

    def problem() -> kp.StaticProblem:
        net = getattr(hf, model)(getattr(hf, model).config_class(**options)).double().eval()
        tokens = torch.randint(2, WORDS, (2, TRIALS, TOKENS))
        given = {"input_ids": tokens[0], "decoder_input_ids": tokens[1], "use_cache": False}
        return kp.StaticProblem(net, given, state="last_hidden_state", axes=STATE_AXES)

    return problem


def audio() -> kp.StaticProblem:
    """wav2vec 2.0 on samples of sound."""
    config = hf.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    )  # fmt: skip
    samples = torch.randn(TRIALS, 160, dtype=torch.float64)
    return kp.StaticProblem(hf.Wav2Vec2Model(config).double().eval(), {"input_values": samples}, "last_hidden_state")


T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
PROBLEMS = {
    "GPT-2": language("GPT2LMHeadModel", vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=2),
    "Llama": language("LlamaForCausalLM", **GROUPED),
    "Qwen2": language("Qwen2ForCausalLM", **GROUPED),
    "Qwen3": language("Qwen3ForCausalLM", **GROUPED),
    "Mistral": language("MistralForCausalLM", **GROUPED, sliding_window=4),
    "Mixtral": language("MixtralForCausalLM", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
    "Gemma": language("GemmaForCausalLM", **GROUPED),
    "Gemma 2": language("Gemma2ForCausalLM", **GROUPED),
    "Phi": language("PhiForCausalLM", **SMALL, num_key_value_heads=1),
    "GPT-NeoX": language("GPTNeoXForCausalLM", **SMALL),
    "GPT-J": language("GPTJForCausalLM", vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    "OPT": language(
        "OPTForCausalLM", **SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=8, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
    ),
    "BLOOM": language("BloomForCausalLM", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2),
    "Falcon": language("FalconForCausalLM", **SMALL),
    "Falcon with ALiBi": language("FalconForCausalLM", **SMALL, alibi=True),
    "MPT": language("MptForCausalLM", vocab_size=WORDS, d_model=16, n_layers=2, n_heads=2, expansion_ratio=2),
    "CTRL": language("CTRLLMHeadModel", vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=2, dff=24),
    "XLNet": language("XLNetLMHeadModel", vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24),
    "Mamba": text("MambaForCausalLM", "lm_head", vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "Mamba 2": text(
        "Mamba2ForCausalLM", "lm_head", vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4, head_dim=8,
        num_heads=4, n_groups=1, chunk_size=4,
    ),
    "RWKV": language("RwkvForCausalLM", vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, context_length=8),
    "RecurrentGemma": language("RecurrentGemmaForCausalLM", **GROUPED | {"num_hidden_layers": 3}, lru_width=16),
    "BERT": hidden("BertModel", **SMALL),
    "BERT, masked words": language("BertForMaskedLM", **SMALL),
    "RoBERTa": hidden("RobertaModel", **SMALL, pad_token_id=1),
    "ALBERT": hidden("AlbertModel", **SMALL, embedding_size=8),
    "DistilBERT": hidden("DistilBertModel", vocab_size=WORDS, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    "ELECTRA": hidden("ElectraModel", **SMALL, embedding_size=8),
    "DeBERTa": hidden("DebertaV2Model", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], pad_token_id=0),
    "MPNet": hidden("MPNetModel", **SMALL, pad_token_id=1),
    "FNet": hidden("FNetModel", vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2),
    "ConvBERT": hidden("ConvBertModel", **SMALL, embedding_size=8, head_ratio=1),
    "Funnel": hidden("FunnelModel", vocab_size=WORDS, d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[1, 1]),
    "T5 encoder": hidden("T5EncoderModel", **T5, pad_token_id=0),
    "T5": encoded("T5Model", **T5),
    "BART": encoded(
        "BartModel", vocab_size=WORDS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=8,
    ),
    "ViT": image("ViTModel", **SMALL | PATCHES),
    "DeiT": image("DeiTModel", **SMALL | PATCHES),
    "BEiT": image("BeitModel", **SMALL | PATCHES),
    "DINOv2": image("Dinov2Model", **SMALL | PATCHES),
    "CLIP's vision": image("CLIPVisionModel", **SMALL | PATCHES),
    "Swin": image(
        "SwinModel", image_size=IMAGE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "ConvNeXt": image("ConvNextModel", patch_size=2, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2),
    "ResNet": image("ResNetModel", embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1]),
    "wav2vec 2.0": audio,
}  # fmt: skip
MEMBERS = [Member(f"transformers: {name}", "transformers", problem) for name, problem in PROBLEMS.items()]
