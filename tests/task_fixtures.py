"""Small models with encoders, a tokenizer of words for them, and training them for a few steps."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch_fixtures import tiny_llama
from transformers import BartConfig, BertConfig, PreTrainedTokenizerFast, T5Config
from transformers.models.bart import modeling_bart
from transformers.models.bert import modeling_bert
from transformers.models.t5 import modeling_t5

from loracle.torch_impl.encoded import EncodedData, EncodingSettings
from loracle.torch_impl.loading import LoadedModel
from loracle.torch_impl.tasks import Task
from loracle.torch_impl.training_set import TrainingSet, training_set

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of single letters: "cab" is c ##a ##b; texts are [CLS] text [SEP], or with a pair
    [CLS] text [SEP] pair [SEP]."""
    vocabulary = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={t: at for at, t in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    pad, unknown, start, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
        eos_token=end,
    )


def ids_of(*tokens: str) -> tuple[int, ...]:
    """The ids of `word_tokenizer`'s tokens."""
    return tuple(word_tokenizer().convert_tokens_to_ids(list(tokens)))


def tiny_bert(kind: str = "BertForMaskedLM", **options: Any) -> Any:
    """A BERT model of two layers, without dropout, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(
        **{
            **sizes,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            **options,
        },
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return getattr(modeling_bert, kind)(config).eval()


def tiny_t5() -> Any:
    """A T5 model of two layers a side, without dropout, in evaluation mode."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=80,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return modeling_t5.T5ForConditionalGeneration(config).eval()


def tiny_bart(kind: str = "BartForConditionalGeneration") -> Any:
    """A BART model of two layers a side, without dropout, in evaluation mode."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=80,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
    )
    return getattr(modeling_bart, kind)(config).eval()


def tiny_causal() -> Any:
    """A Llama model with the vocabulary of `word_tokenizer`, which the configuration gives no padding."""
    return tiny_llama(vocab_size=80, pad_token_id=None, eos_token_id=3)


def write_words_model(folder: Path, model: Any) -> Path:
    """A folder with ``model`` and `word_tokenizer`."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def encoded(task: Task, loaded: LoadedModel, examples: Iterable[Any], max_length: int = 32) -> EncodedData:
    """``examples`` as ``task`` encodes them for a loaded model."""
    settings = EncodingSettings(max_length, "d", loaded.labels, loaded.token_types)
    return task.encode(loaded.tokenizer, tuple(examples), settings)


def train(
    task: Task,
    loaded: LoadedModel,
    data: EncodedData,
    *,
    epochs: int,
    packing: bool = False,
    mask_probability: float = 0.15,
) -> TrainingSet:
    """Train what requires a gradient with Adam, in batches of four, as the sampler orders them."""
    rows = training_set(
        task,
        data,
        loaded.model,
        loaded.tokenizer,
        seed=0,
        packing=packing,
        max_length=32,
        mask_probability=mask_probability,
    )
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    sampler: Any = rows.sampler(4, 0)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for at in range(0, len(order), 4):
            batch = rows.collate([rows.rows[draw] for draw in order[at : at + 4]])
            optimizer.zero_grad()
            rows.loss(loaded.model, batch, None).backward()
            optimizer.step()
    return rows


def unfreeze(model: nn.Module, modules: Iterable[str]) -> None:
    """Let whole modules be trained beside adapters."""
    for path in modules:
        model.get_submodule(path).requires_grad_(True)
