"""Make the demo model: python -m worker.demo.train

Courses, one after the other, which learn from pictures and captions that are made while they
run: the autoencoder, twice; the reader (the text encoder); the transformer, which first sketches
and then paints; and the autoencoder and the transformer once more. Interrupted, the same command
goes on; with another `--seed` and `--run` another model comes out. Sheets of samples and the
losses lie in the run's folder.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from worker import canvas
from worker.canvas import Canvas, Grid
from worker.demo import WEIGHTS, architecture
from worker.demo.training import course
from worker.demo.training.autoencoder import Autoencoder, Finer, Finest, Suns
from worker.demo.training.course import Lesson
from worker.demo.training.painter import Painter, Repainter, Sketcher
from worker.demo.training.reader import Reader
from worker.demo.training.tokens import tokenizer

SEED = 1
STEPS = {
    "autoencoder": 1200,
    "finer": 400,
    "reader": 1500,
    "sketcher": 1400,
    "painter": 2500,
    "finest": 3200,
    "suns": 2400,
    "repainter": 4800,
}


def train(
    run: Path,
    *,
    seed: int,
    share: float = 1.0,
    device: str = "cpu",
    helpers: int = 1,
    show_steps: int | None = 500,
) -> Path:
    """Train what is not trained yet in `run`, and return the folder in it with the model.

    `share` shortens every course, to see that all of it works; what it makes cannot draw. The rest
    is as `course.run` has it.
    """

    def take(lesson: Lesson) -> None:
        course.run(lesson, run, helpers=helpers, show_steps=show_steps)

    steps = {name: max(1, round(count * share)) for name, count in STEPS.items()}
    tokens = _tokenizer(run / "tokenizer", seed)
    autoencoder = Autoencoder(seed=seed, steps=steps["autoencoder"], device=device)
    take(autoencoder)
    vae = autoencoder.model
    take(Finer(vae, seed=seed, steps=steps["finer"]))
    reader = Reader(tokens, seed=seed, steps=steps["reader"], device=device)
    take(reader)
    sketcher = Sketcher(tokens, reader.model, seed=seed, steps=steps["sketcher"])
    take(sketcher)
    take(Painter(sketcher, vae, steps=steps["painter"]))
    take(Finest(vae, seed=seed, steps=steps["finest"]))
    take(Suns(vae, seed=seed, steps=steps["suns"]))
    painter = Repainter(sketcher, vae, steps=steps["repainter"])
    take(painter)
    return save(run / "model", tokens, reader.model, vae, painter.model.transformer)


def save(
    folder: Path,
    tokens: Qwen2Tokenizer,
    encoder: torch.nn.Module,
    vae: torch.nn.Module,
    transformer: torch.nn.Module,
) -> Path:
    """Write a model as diffusers lays it out, in half precision, with its canvas."""
    parts = [part.to("cpu", torch.float16) for part in (encoder, vae, transformer)]
    shutil.rmtree(folder, ignore_errors=True)
    architecture.pipeline(tokens, *parts).save_pretrained(folder)
    canvas.write(folder, Canvas(tuple(Grid(*grid) for grid in architecture.GRIDS)))
    for weights in folder.rglob("*.safetensors"):
        # safetensors lets only their owner read them; whoever runs the service may be another.
        weights.chmod(0o644)
    return folder


def _tokenizer(folder: Path, seed: int) -> Qwen2Tokenizer:
    if not folder.is_dir():
        tokenizer(seed).save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path(".demo"), help="what is kept meanwhile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--helpers", type=int, default=1, help="processes that paint meanwhile")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the steps: 0.01 is a rehearsal"
    )
    parser.add_argument(
        "--install", action="store_true", help=f"then put it in the place of {WEIGHTS.name}/"
    )
    chosen = parser.parse_args()
    model = train(
        chosen.run,
        seed=chosen.seed,
        share=chosen.share,
        device=chosen.device,
        helpers=chosen.helpers,
    )
    print(
        f"The model is in {model}. How good it is: python -m worker.demo.evaluate --model {model}"
    )
    if chosen.install:
        shutil.copytree(model, WEIGHTS, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
