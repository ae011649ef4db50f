"""The image classifier: any image-classification model of the `transformers` library."""

import threading
from collections.abc import Collection
from typing import Any

import structlog
from PIL.Image import Image

logger = structlog.get_logger()


class ClassifierUnusable(Exception):
    """The classifier cannot be loaded; the message says which model, and why."""


class Classifier:
    """A model that is loaded when it is first needed; threads may share it."""

    def __init__(
        self,
        model: str,
        *,
        labels: Collection[str],
        threshold: float,
        strict_threshold: float,
        device: str,
    ) -> None:
        """
        Args:
            model: a folder, or an id on the Hugging Face hub.
            labels: those that are refused, as the model names them, in any case.
            threshold: probability from which an image is refused.
            strict_threshold: the same for callers who asked for strict moderation.
            device: where torch computes, for example `cpu` or `cuda:0`.
        """
        self._name = model
        self._labels = {label.casefold() for label in labels}
        self._thresholds = {False: threshold, True: strict_threshold}
        self._device = device
        self._lock = threading.Lock()
        self._processor: Any = None
        self._model: Any = None
        self._refused: dict[int, str] = {}

    def load(self) -> None:
        """Load the model now, and not at the first image.

        Raises:
            ClassifierUnusable: there is none, or it lacks a label.
        """
        with self._lock:
            self._load()

    def refusing(self, image: Image, *, strict: bool) -> tuple[str, float] | None:
        """Return the likeliest of the refused labels and its probability, if that is enough.

        Raises:
            ClassifierUnusable: it cannot be loaded, or does not answer with numbers.
        """
        import torch  # only here: a process whose images nobody looks at need not wait for it

        # One image at a time: on one device two are no faster, and take the memory of two.
        with self._lock, torch.inference_mode():
            self._load()
            pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")
            logits = self._model(**pixels.to(self._device)).logits[0].float().cpu()
        if not logits.isfinite().all():
            raise ClassifierUnusable(f"The image classifier {self._name!r} gave no numbers")
        several = self._model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if several or len(logits) == 1 else logits.softmax(-1)
        index = max(self._refused, key=lambda index: float(probabilities[index]))
        probability = float(probabilities[index])
        if probability < self._thresholds[strict]:
            return None
        return self._refused[index], probability

    def _load(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            processor = AutoImageProcessor.from_pretrained(self._name)
            model = AutoModelForImageClassification.from_pretrained(
                self._name,
                use_safetensors=True,  # never a pickle, which can run code
            )
            model.eval().to(self._device)
        except Exception as error:  # the libraries raise anything
            raise ClassifierUnusable(
                f"The image classifier {self._name!r} could not be loaded: {error}"
            ) from error
        names = {int(index): str(label) for index, label in model.config.id2label.items()}
        lacking = self._labels - {label.casefold() for label in names.values()}
        if lacking or not self._labels:
            raise ClassifierUnusable(
                f"The image classifier {self._name!r} has no label "
                f"{', '.join(sorted(lacking)) or 'that is refused'}; "
                f"it has {', '.join(names.values())}"
            )
        self._refused = {
            index: label for index, label in names.items() if label.casefold() in self._labels
        }
        self._processor = processor
        self._model = model
        logger.info("moderation.classifier_loaded", model=self._name, device=self._device)
