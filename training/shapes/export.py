"""Writes a model directory in the Hugging Face layout, with weights in bfloat16.

python -m training.shapes.export CHECKPOINT DIRECTORY
python -m training.shapes.export --random DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from training.shapes.architecture import LEAST_PIXELS, MOST_PIXELS, PROCESSOR, build_model
from training.shapes.tokenizer import build_tokenizer

MOST_FRAMES = 24
VIDEO_PROCESSOR = {
    **{key: value for key, value in PROCESSOR.items() if key != "image_processor_type"},
    "video_processor_type": "Qwen3VLVideoProcessor",
    "fps": 2,
    "min_frames": 4,
    "max_frames": MOST_FRAMES,
    # Limits on the pixels of the whole video, as in Qwen3-VL: frames times height times width. A frame may always have
    # 1.05 times the lower limit, however many frames there are, so this limit must not exceed the size of one frame.
    "size": {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_FRAMES * MOST_PIXELS},
    "cap_pixels_per_frame": True,
    "max_video_tokens": 64,
}


def export(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves weights, configuration, tokenizer and processors to ``directory``.

    Files are replaced and not overwritten, so that a process with the old weights mapped keeps them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory(dir=directory.parent) as made:
        model.bfloat16().save_pretrained(made)
        tokenizer.save_pretrained(made)
        for name, settings in (("preprocessor_config", PROCESSOR), ("video_preprocessor_config", VIDEO_PROCESSOR)):
            Path(made, f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")
        for path in sorted(Path(made).iterdir()):
            path.chmod(0o644)
            path.replace(directory / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a checkpoint of the training")
    parser.add_argument("--random", action="store_true", help="random weights instead of a checkpoint")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.random == (arguments.checkpoint is not None):
        parser.error("give a checkpoint or --random, and not both")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    if arguments.checkpoint is not None:
        model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True)["average"])
    export(model, tokenizer, arguments.directory)
    size = (arguments.directory / "model.safetensors").stat().st_size
    print(f"{arguments.directory}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
