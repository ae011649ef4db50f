"""The tables of the peers, and their two engines: asynchronous for the API, plain for workers."""

import hashlib
import os
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, ForeignKey, create_engine, func
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

POOL_SIZE = 20
POOL_OVERFLOW_MAX = 20
"""As many connections as a process of ours may have."""
PRICE = 15

_url = os.environ["PEER_DATABASE_URL"]
_engine = create_async_engine(
    _url.replace("postgresql:", "postgresql+asyncpg:", 1),
    pool_size=POOL_SIZE,
    max_overflow=POOL_OVERFLOW_MAX,
)
# An object that is committed is answered as it is: nothing is read again.
AsyncSessions = async_sessionmaker(_engine, expire_on_commit=False)
engine = create_engine(_url.replace("postgresql:", "postgresql+psycopg:", 1))
Sessions = sessionmaker(engine, expire_on_commit=False)


class Row(DeclarativeBase):
    pass


class Account(Row):
    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= reserved"), CheckConstraint("reserved >= 0"))

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    balance: Mapped[int]
    reserved: Mapped[int] = mapped_column(default=0)


class ApiKey(Row):
    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    hash: Mapped[str] = mapped_column(unique=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey(Account.id))


class Task(Row):
    __tablename__ = "tasks"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    account_id: Mapped[UUID] = mapped_column(ForeignKey(Account.id), index=True)
    prompt: Mapped[str]
    status: Mapped[str] = mapped_column(default="pending")
    image_key: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Charge(Row):
    __tablename__ = "charges"

    task_id: Mapped[UUID] = mapped_column(ForeignKey(Task.id), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey(Account.id), index=True)
    credits: Mapped[int]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
