"""The default model is as accurate as its card says, and training computes the same as serving."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen3VLForConditionalGeneration

from embferry.models import DEFAULT_MODEL, model_path, packaged_models
from training.shapes.batches import Layout, Writer, draw_examples, patchify, prompt
from training.shapes.evaluate import KINDS, answer, held_out
from training.shapes.examples import answers
from training.shapes.learner import Learner
from training.shapes.questions import Question
from training.shapes.tokenizer import END, START, build_tokenizer
from training.shapes.undivided import Undivided

MEDIA = Path(__file__).parents[2] / "examples" / "media"
MOST_BYTES = 8_000_000
QUESTIONS = 20
KINDS_USED = sorted(set(KINDS) - {"where", "pictures: colour of"})
"""The kinds that the demo and the README may use; the card says at least 0.95."""


@pytest.fixture(scope="module")
def undivided() -> Iterator[Undivided]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Undivided(model_path(DEFAULT_MODEL))
    torch.set_num_threads(threads)


def test_the_default_model_is_packaged() -> None:
    directory = model_path(DEFAULT_MODEL)
    assert DEFAULT_MODEL in packaged_models()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= MOST_BYTES


def test_a_directory_with_a_configuration_is_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        model_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_path(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["", "no-such-model", "../shapes"])
def test_an_unknown_model_is_rejected_and_the_packaged_ones_listed(name: str) -> None:
    with pytest.raises(ValueError, match="shapes"):
        model_path(name)


@pytest.mark.sweeps
@pytest.mark.parametrize("kind", KINDS_USED)
def test_held_out_questions_are_answered(undivided: Undivided, kind: str) -> None:
    cases = list(islice(held_out(kind, seed=1), QUESTIONS))
    wrong = [
        (case.question.text, case.question.answer, given)
        for case in cases
        if (given := answer(undivided, case)) != case.question.answer
    ]
    assert len(wrong) <= 0.05 * QUESTIONS, wrong


def test_the_questions_about_the_example_media_are_answered(undivided: Undivided) -> None:
    wrong = [asked for asked in answers(MEDIA, undivided) if asked[2] != asked[3]]
    assert not wrong


def test_case_does_not_matter(undivided: Undivided) -> None:
    case = next(held_out("colour of"))
    assert undivided.ask_pictures(case.images, case.question.text.upper()) == answer(undivided, case)


def test_the_packaged_tokenizer_is_the_one_the_scripts_build(undivided: Undivided) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == undivided.tokenizer.get_vocab()
    assert built.chat_template == undivided.tokenizer.chat_template


def test_the_template_numbers_several_pictures(undivided: Undivided) -> None:
    def text(pictures: int) -> str:
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": "how many?"}]
        messages = [{"role": "user", "content": content}]
        return str(undivided.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    group = "<|vision_start|><|image_pad|><|vision_end|>"
    end = f"how many?{END}\n{START}assistant\n"
    assert text(1) == f"{START}user\n{group}{end}"
    assert text(2) == f"{START}user\nPicture 1: {group}Picture 2: {group}{end}"


def test_patches_are_cut_as_the_image_processor_cuts_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    processor = AutoImageProcessor.from_pretrained(model_path(DEFAULT_MODEL))
    theirs = processor([Image.fromarray(pixels)], return_tensors="np")["pixel_values"]
    ours = patchify(np.stack([pixels, pixels])[None])[0].astype(np.float32) / 127.5 - 1
    assert np.abs(theirs - ours).max() < 1e-6


@pytest.mark.parametrize(
    "layout",
    [Layout("picture", (128, 96), 1), Layout("pictures", (64, 80), 3), Layout("clip", (96, 64), 3)],
    ids=lambda layout: layout.form,
)
def test_training_and_serving_compute_the_same(undivided: Undivided, layout: Layout) -> None:
    """The loss of the batched forward pass equals the loss of Hugging Face over the same questions."""
    writer, model = Writer(undivided.tokenizer), undivided.model
    (example,) = draw_examples(Random(5), layout, 1, 3)
    batch = writer.write([example], layout, fps=2.0)
    with torch.no_grad():
        trained = Learner(model, torch.float32)(batch)[0].answer.item()
    assert trained == pytest.approx(
        _loss_of_hugging_face(model, writer, layout, example.questions, batch.patches), abs=1e-5
    )


def _loss_of_hugging_face(
    model: Qwen3VLForConditionalGeneration,
    writer: Writer,
    layout: Layout,
    questions: list[Question],
    patches: torch.Tensor,
) -> float:
    rows, columns = layout.size[1] // 8, layout.size[0] // 8
    pixels = patches.flatten(0, 1).float() / 127.5 - 1
    if pixels.shape[1] == 192:
        pixels = pixels.view(-1, 3, 1, 64).expand(-1, 3, 2, 64).reshape(-1, 384)
    if layout.form == "clip":
        vision = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[layout.items, rows, columns]])}
    else:
        vision = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]] * layout.items)}
    losses = []
    for question in questions:
        asked = [*writer.encode(prompt(layout, 2.0)), *writer.encode(question.text), *writer.ask_end]
        given = [*writer.encode(question.answer), writer.end]
        ids = torch.tensor([asked + given[:-1]])
        kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **vision).logits[0, -len(given) :]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(given), reduction="none"))
    return torch.cat(losses).mean().item()
