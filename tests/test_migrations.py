"""The migrations make what the models say, and undo it."""

from pathlib import Path

import alembic.command
from alembic.config import Config
from sqlalchemy import inspect

from storage.database import engine
from storage.models import Base

CONFIG = Config(toml_file=Path(__file__).parent.parent / "pyproject.toml")


def test_the_models_and_the_migrations_agree() -> None:
    alembic.command.check(CONFIG)


def test_down_and_up_again() -> None:
    alembic.command.downgrade(CONFIG, "base")
    try:
        assert not set(inspect(engine).get_table_names()) & set(Base.metadata.tables)
    finally:
        alembic.command.upgrade(CONFIG, "head")
    assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())
