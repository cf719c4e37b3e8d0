"""Small configurations of transformers' networks: random weights, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architecture import Architecture, Input, mask, numbers, tokens
from libraries import transformers
from torch import Tensor, nn


class BothSides(nn.Module):
    """An encoder and a decoder as a function of both token sequences; the library's own signature has other inputs between."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, decoder_input_ids=decoder_ids).last_hidden_state


TOKENS, MASK, IMAGE = tokens(12), mask(12), numbers(3, 32, 32)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "num_labels": 5}
ENDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**ENDS, "n_layer": 2, "n_head": 4, "use_cache": False}
LLAMA = {**ENDS, **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 10}
T5 = {**ENDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
ENCODER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
SEGFORMER = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]}
WAVES = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "classifier_proj_size": 16}
POSITIONS = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
SERIES = {"num_input_channels": 2, "context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8}
LATENTS = {"num_latents": 6, "d_latents": 16, "num_self_attention_heads": 2, "num_cross_attention_heads": 2}

Build = Callable[[Any], nn.Module]


def _classifier(family: str, name: str, build: Build, *inputs: Input) -> Architecture:
    return Architecture(name, family, "transformers", lambda: build(transformers()), inputs, True, "logits")


def _values(family: str, name: str, output: str | None, build: Build, *inputs: Input) -> Architecture:
    return Architecture(name, family, "transformers", lambda: build(transformers()), inputs, False, output)


TRANSFORMERS = (
    _classifier("BERT", "BERT", lambda t: t.BertForSequenceClassification(t.BertConfig(**BERT)), TOKENS, MASK),
    _classifier("BERT", "DistilBERT", lambda t: t.DistilBertForSequenceClassification(_distilled(t)), TOKENS, MASK),
    _classifier(
        "BERT",
        "ALBERT (shared layers)",
        lambda t: t.AlbertForSequenceClassification(t.AlbertConfig(**BERT, embedding_size=16)),
        TOKENS,
        MASK,
    ),
    _classifier(
        "BERT",
        "ELECTRA",
        lambda t: t.ElectraForSequenceClassification(t.ElectraConfig(**BERT, embedding_size=16)),
        TOKENS,
        MASK,
    ),
    _classifier("BERT", "MobileBERT", lambda t: t.MobileBertForSequenceClassification(_mobile(t)), TOKENS, MASK),
    _classifier("BERT", "DeBERTa v2", lambda t: t.DebertaV2ForSequenceClassification(_relative(t)), TOKENS, MASK),
    _classifier("FNet", "FNet (Fourier mixing)", lambda t: t.FNetForSequenceClassification(_fourier(t)), TOKENS),
    _classifier("XLNet", "XLNet", lambda t: t.XLNetForSequenceClassification(_xlnet(t)), TOKENS),
    _values("GPT", "GPT-2", "logits", lambda t: t.GPT2LMHeadModel(t.GPT2Config(**GPT, n_embd=32)), TOKENS),
    _values(
        "GPT",
        "GPT-NeoX",
        "logits",
        lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**ENDS, **SMALL, use_cache=False)),
        TOKENS,
    ),
    _values(
        "GPT", "BLOOM (ALiBi)", "logits", lambda t: t.BloomForCausalLM(t.BloomConfig(**GPT, hidden_size=32)), TOKENS
    ),
    _values("LLaMA", "LLaMA", "logits", lambda t: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)), TOKENS),
    _values("LLaMA", "Qwen3", "logits", lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA, head_dim=8)), TOKENS),
    _values("LLaMA", "Gemma 2", "logits", lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**LLAMA, head_dim=8)), TOKENS),
    _values("state space", "Mamba", "logits", lambda t: t.MambaForCausalLM(_mamba(t)), tokens(6)),
    _values("T5", "T5 encoder", "last_hidden_state", lambda t: t.T5EncoderModel(t.T5Config(**T5)), TOKENS, MASK),
    _values(
        "BART",
        "BART (two token sequences)",
        None,
        lambda t: BothSides(t.BartModel(t.BartConfig(**ENDS, **ENCODER, **DECODER, use_cache=False))),
        TOKENS,
        tokens(8),
    ),
    _classifier("ViT", "ViT, 2 blocks", lambda t: t.ViTForImageClassification(t.ViTConfig(**VISION)), IMAGE),
    _classifier("ViT", "DINOv2, 2 blocks", lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**VISION)), IMAGE),
    _values(
        "CLIP",
        "CLIP's image encoder",
        "pooler_output",
        lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        IMAGE,
    ),
    _values(
        "segmentation",
        "SegFormer",
        "logits",
        lambda t: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(**SEGFORMER, decoder_hidden_size=16, num_labels=4)
        ),
        IMAGE,
    ),
    _classifier(
        "audio",
        "wav2vec 2.0",
        lambda t: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**SMALL, **WAVES, **POSITIONS, num_labels=5)),
        numbers(400),
    ),
    _values("audio", "Whisper's encoder", "last_hidden_state", lambda t: _whisper(t), numbers(8, 32)),
    _values(
        "time series",
        "PatchTST",
        "prediction_outputs",
        lambda t: t.PatchTSTForPrediction(
            t.PatchTSTConfig(**SERIES, d_model=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32)
        ),
        numbers(32, 2),
    ),
    _values(
        "Perceiver",
        "Perceiver",
        "last_hidden_state",
        lambda t: t.PerceiverModel(t.PerceiverConfig(**LATENTS, d_model=16, num_self_attends_per_block=1)),
        numbers(10, 16),
    ),
)


def _distilled(t: Any) -> Any:
    return t.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=5)


def _mobile(t: Any) -> Any:
    return t.MobileBertConfig(**BERT, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16)


def _relative(t: Any) -> Any:
    return t.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])


def _fourier(t: Any) -> Any:
    return t.FNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_labels=5)


def _xlnet(t: Any) -> Any:
    return t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=5)


def _mamba(t: Any) -> Any:
    return t.MambaConfig(**ENDS, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False)


def _whisper(t: Any) -> nn.Module:
    config = t.WhisperConfig(**ENCODER, num_mel_bins=8, max_source_positions=16)
    return t.models.whisper.modeling_whisper.WhisperEncoder(config)
