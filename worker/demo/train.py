"""Make the demo model: python -m worker.demo.train

Courses, one after the other, which learn from pictures and captions that are made while they
run: four of the autoencoder; the reader (the text encoder); and three of the transformer, which
first sketches, then paints, and then paints what is hard. Interrupted, the same command goes on;
with another `--seed` and `--run` another model comes out. Sheets of samples and the losses lie in
the run's folder.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
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
    "finest": 3200,
    "suns": 2400,
    "reader": 1500,
    "sketcher": 1400,
    "painter": 2500,
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
    parts_of: Path | None = None,
    compiled: bool = False,
) -> Path:
    """Train what is not trained yet in `run`, and return the folder in it with the model.

    `share` shortens every course, to see that all of it works; what it makes cannot draw.
    `parts_of` is a model whose tokenizer, autoencoder and text encoder are taken as they are;
    without one, they are trained as well. `compiled` has the transformer's blocks compiled first.
    The rest is as `course.run` has it.
    """

    def take(lesson: Lesson) -> None:
        course.run(lesson, run, helpers=helpers, show_steps=show_steps)

    steps = {name: max(1, round(count * share)) for name, count in STEPS.items()}
    if parts_of:
        tokens, reader, vae = architecture.parts(parts_of, device)
    else:
        tokens = _tokenizer(run / "tokenizer", seed)
        autoencoder = Autoencoder(seed=seed, steps=steps["autoencoder"], device=device)
        take(autoencoder)
        vae = autoencoder.model
        take(Finer(vae, seed=seed, steps=steps["finer"]))
        take(Finest(vae, seed=seed, steps=steps["finest"]))
        take(Suns(vae, seed=seed, steps=steps["suns"]))
        reading = Reader(tokens, seed=seed, steps=steps["reader"], device=device)
        take(reading)
        reader = reading.model
    sketcher = Sketcher(tokens, reader, seed=seed, steps=steps["sketcher"])
    if compiled:
        compile_blocks(sketcher.model.transformer)
    take(sketcher)
    take(Painter(sketcher, vae, steps=steps["painter"]))
    painter = Repainter(sketcher, vae, steps=steps["repainter"])
    take(painter)
    return save(run / "model", tokens, reader, vae, painter.model.transformer)


def compile_blocks(transformer: ZImageTransformer2DModel) -> None:
    """Compile a transformer's blocks in place, for the few shapes that training has."""
    # A block learns from pictures, from captions or from both, short or long, with a question
    # after it or without: more shapes than are compiled by default.
    torch._dynamo.config.recompile_limit = 32
    # Made of matrices' products, attention is compiled with what is around it; the one for
    # processors is not, and is slow on its way back in bfloat16.
    transformer.set_attention_backend("_native_math")
    transformer.compile_repeated_blocks(dynamic=False)


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
        "--parts-of",
        type=Path,
        metavar="MODEL",
        help="take all but the transformer from a model, and train that alone",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compile it: faster on CPUs, and needs a C++ compiler",
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
        parts_of=chosen.parts_of,
        compiled=chosen.compiled,
    )
    print(
        f"The model is in {model}. How good it is: python -m worker.demo.evaluate --model {model}"
    )
    if chosen.install:
        shutil.copytree(model, WEIGHTS, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
