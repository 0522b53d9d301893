"""The embedded world's LLaVA and InstructBLIP: the real transformers classes at about one million parameters."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiments.worlds.scenes import IMAGE_SIZE

PATCH_SIZE = 8
PATCH_COUNT = (IMAGE_SIZE // PATCH_SIZE) ** 2
VISION = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
QUERY_TOKENS = 12
INITIALIZER_RANGE = 0.06  # about 1 / sqrt(hidden size): at the usual 0.02 models this small learn several times slower
LLAVA_WORDS = ("user", "assistant", ":")


def language_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of Llama's kind: ``<s>`` in front, right padding until told otherwise."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(specials, words, "<unk>", "<s> $A", ["<s>"]),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def llava(words: list[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer = language_tokenizer(sorted({*words, *LLAVA_WORDS}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        # LLaVA reads the last but one layer, so one more layer than is used.
        vision_config=CLIPVisionConfig(num_hidden_layers=4, **VISION).to_dict(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCH_COUNT,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
    )
    model = LlavaForConditionalGeneration(config)
    _set_generation_ids(model)
    return model, processor


def instructblip(words: list[str]) -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    tokenizer = language_tokenizer(sorted(words))
    qformer_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_level(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], sorted(words), "[UNK]", "[CLS] $A [SEP]", ["[CLS]", "[SEP]"]
        ),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        qformer_tokenizer,
        num_query_tokens=QUERY_TOKENS,
    )
    config = InstructBlipConfig(
        # transformers initialises this tower with a deviation of 1e-10, of use only when weights are loaded over it.
        vision_config=InstructBlipVisionConfig(num_hidden_layers=3, initializer_range=0.02, **VISION).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(qformer_tokenizer),
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            initializer_range=INITIALIZER_RANGE,
            cross_attention_frequency=1,
            encoder_hidden_size=VISION["hidden_size"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=64,
        ).to_dict(),
        text_config=_llama(tokenizer),
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    model.query_tokens.data.normal_(0, 0.5)
    _set_generation_ids(model)
    return model, processor


def _llama(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        initializer_range=INITIALIZER_RANGE,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).to_dict()


def _set_generation_ids(model: PreTrainedModel) -> None:
    text = model.config.text_config
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id


def _word_level(specials: list[str], words: list[str], unknown: str, template: str, added: list[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in added]
    )
    return tokenizer
