"""The tokenizer: a byte-level BPE in lower case, small because the model uses few words."""

from __future__ import annotations

from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.shapes import questions
from training.shapes.scenes import COLOUR_NAMES, SHAPES
from training.shapes.video import DIRECTIONS

VOCABULARY = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, START, END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO)
MAX_LENGTH = 8192
"""Positions of the text model."""

# Qwen's tokenizers split text before merging into contractions, words with a leading space, single digits, and marks.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Several pictures are numbered, as in Qwen's own template with "add_vision_id". An engine replaces <|image_pad|> by one
# pad token for each merged patch, and a video by one group with its time for each temporal patch.
CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0, number=0) -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type in ('image', 'image_url') -%}
{%- set seen.pictures = seen.pictures + 1 -%}
{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{%- set seen.number = seen.number + 1 -%}
{%- if seen.pictures > 1 -%}{{- 'Picture ' ~ seen.number ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def corpus() -> list[str]:
    """Returns sentences with all words of the questions and answers, and few others."""
    templates = (
        *questions.COUNT,
        *questions.COLOUR,
        *questions.SHAPE,
        *questions.EXISTS,
        *questions.WHERE,
        *questions.WHICH,
        *questions.PICTURES,
        *questions.MOVING,
        *questions.DIRECTION,
        *questions.MOVER,
        *questions.WHICH_SHAPE_MOVES,
    )
    names = [*COLOUR_NAMES, *SHAPES, *(f"{shape}s" for shape in SHAPES), "shapes", "things", "shape", "thing", "it"]
    nouns = [f"{article} {name}" for article, name in product(("a", "an", "the"), names)]
    places = ["", " in the picture", " in the video", *(f" in picture {n}" for n in range(1, 5))]
    text = [
        template.format(what=noun, place=place, colour=spelling)
        for template, noun, place, spelling in product(templates, nouns, places, ("colour", "color"))
    ]
    answers = [
        *COLOUR_NAMES,
        *SHAPES,
        *DIRECTIONS,
        "yes",
        "no",
        "nothing",
        *(p for row in questions.PLACES for p in row),
    ]
    answers += [f"the {colour} {shape}" for colour, shape in product(COLOUR_NAMES, SHAPES)]
    other = ("user\n", "assistant\n", "system\n", "0.2 seconds", "picture 1: ", "image", "images", "photo", "clip")
    return text + 200 * [*answers, *other, *(f" {answer}" for answer in answers)]


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Returns the id of a token of the vocabulary."""
    return int(tokenizer.get_vocab()[token])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the same corpus gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
