"""Captions in English and Chinese, and the scenes that they ask for, from one small grammar."""

import random
from enum import StrEnum

from worker.demo.chinese import Chinese
from worker.demo.english import English
from worker.demo.scenes import Scene
from worker.demo.wishes import Wish, scene_of, wish


class Language(StrEnum):
    ENGLISH = "en"
    CHINESE = "zh"


def caption(dice: random.Random) -> tuple[Scene, str]:
    """Return a scene and words for it, in either language."""
    asked = wish(dice)
    language = Language.CHINESE if dice.random() < 0.4 else Language.ENGLISH
    return scene_of(asked), said(asked, language, dice)


def said(asked: Wish, language: Language, dice: random.Random) -> str:
    """Put a wish into words, one of many ways."""
    return (English(dice) if language is Language.ENGLISH else Chinese(dice)).say(asked)
