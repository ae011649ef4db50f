"""What is not drawn, and what is not sent: rules for prompts, and a classifier for images.

The base is refused to everybody, the strict level to callers who asked for it (`nsfw_check`).
"""

import structlog
from PIL.Image import Image

from storage.errors import ContentRefused
from worker.moderation import rulebook
from worker.moderation.classifier import Classifier, ClassifierUnusable
from worker.moderation.rulebook import Rules, RulesUnusable
from worker.settings import WorkerSettings

__all__ = ["Classifier", "ClassifierUnusable", "Moderator", "Rules", "RulesUnusable", "of_settings"]

logger = structlog.get_logger()


class Moderator:
    """Refuses prompts and images, and logs each refusal; threads may share it."""

    def __init__(self, rules: Rules, *, classifier: Classifier | None, log_prompts: bool) -> None:
        """
        Args:
            classifier: None where images are not looked at.
            log_prompts: whether the log of a refusal has the customer's text.
        """
        self._rules = rules
        self._classifier = classifier
        self._log_prompts = log_prompts

    def check_prompt(self, prompt: str, *, strict: bool) -> None:
        """Raises: ContentRefused."""
        rule = self._rules.refusing(prompt, strict=strict)
        if rule is None:
            return
        text = {"prompt": prompt} if self._log_prompts else {}
        logger.info("moderation.refused", stage="prompt", rule=rule, strict=strict, **text)
        raise ContentRefused("The prompt may contain inappropriate content. You were not charged.")

    def check_image(self, image: Image, *, strict: bool) -> None:
        """Whatever else is raised means that nobody looked: the image must not go out.

        Raises:
            ContentRefused: the classifier is sure enough.
            ClassifierUnusable: it cannot be loaded or gives no numbers.
        """
        refusing = self._classifier and self._classifier.refusing(image, strict=strict)
        if not refusing:
            return
        label, probability = refusing
        logger.info(
            "moderation.refused",
            stage="image",
            rule=f"classifier.{label}",
            strict=strict,
            probability=round(probability, 4),
        )
        raise ContentRefused("The image may contain inappropriate content. You were not charged.")


def of_settings(settings: WorkerSettings, *, device: str) -> Moderator:
    """Return the moderator that the settings describe; its classifier is not loaded yet.

    Raises:
        RulesUnusable: there is something wrong with the rules. A process must not start so.
    """
    classifier = None
    if settings.moderation_classifier:
        classifier = Classifier(
            settings.moderation_classifier,
            labels=settings.moderation_labels,
            threshold=settings.moderation_threshold,
            strict_threshold=settings.moderation_strict_threshold,
            device=device,
        )
    extra = [settings.moderation_rules] if settings.moderation_rules else []
    return Moderator(
        rulebook.load(rulebook.BUILT_IN, *extra),
        classifier=classifier,
        log_prompts=settings.moderation_log_prompts,
    )
