"""The rows: who pays, with which key, for which task, and every credit that moved."""

from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    Numeric,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.sealing import unseal


class TaskStatus(StrEnum):
    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset((TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED))


class ImageFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class EntryKind(StrEnum):
    GRANT = "grant"
    CHARGE = "charge"
    ADJUSTMENT = "adjustment"


class DeliveryState(StrEnum):
    WAITING = "waiting"
    DELIVERED = "delivered"
    GAVE_UP = "gave_up"


def _by_value(enum: type[StrEnum]) -> Enum:
    """Stored by value, checked by the database, and read back as the enum."""
    return Enum(
        enum,
        native_enum=False,
        length=16,
        create_constraint=True,
        name=enum.__name__.lower(),
        values_callable=lambda members: [str(member) for member in members],
    )


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it, nobody changes it
        datetime: DateTime(timezone=True),
        Decimal: Numeric(18, 6),
        str: Text,
        list[str]: ARRAY(Text),
        TaskStatus: _by_value(TaskStatus),
        ImageFormat: _by_value(ImageFormat),
        EntryKind: _by_value(EntryKind),
        DeliveryState: _by_value(DeliveryState),
    }


class Account(Base):
    """Who pays.

    `balance` is the sum of the account's entries, `reserved` the sum of the prices of its
    unfinished tasks, `unfinished` their number. What can still be spent is balance - reserved.
    """

    __tablename__ = "accounts"
    __table_args__ = (
        CheckConstraint("reserved >= 0", name="reserved_not_negative"),
        CheckConstraint("balance >= reserved", name="balance_covers_reserved"),
        CheckConstraint("unfinished >= 0", name="unfinished_not_negative"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    user_group: Mapped[str]
    balance: Mapped[Decimal] = mapped_column(default=Decimal(0))
    reserved: Mapped[Decimal] = mapped_column(default=Decimal(0))
    unfinished: Mapped[int] = mapped_column(default=0)
    unfinished_max: Mapped[int | None]
    suspended: Mapped[bool] = mapped_column(default=False)
    virtual_finish: Mapped[float] = mapped_column(default=0.0)
    """Where this account's last task ends in virtual time; see `storage.fairness`."""
    sealed_callback_secret: Mapped[str] = mapped_column("callback_secret")
    """By `storage.sealing`, as is the next."""
    sealed_callback_secret_before: Mapped[str | None] = mapped_column("callback_secret_before")
    callback_secret_before_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    @property
    def callback_secret(self) -> str:
        """What signs callbacks. Raises: CannotUnseal."""
        return unseal(self.sealed_callback_secret)

    @property
    def callback_secret_before(self) -> str | None:
        """The secret that was replaced; signs as well until `callback_secret_before_until`."""
        before = self.sealed_callback_secret_before
        return None if before is None else unseal(before)


class ApiKey(Base):
    """A bearer key. Its secret is shown once; the row holds the SHA-256 of it."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    name: Mapped[str]
    secret_sha256: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    prefix: Mapped[str]
    models: Mapped[list[str] | None]
    """Models that this key may use; None means all."""
    admin: Mapped[bool]
    requests_per_minute: Mapped[int | None]
    """Creates per minute; None means that neither creates nor reads are limited."""
    used_credits: Mapped[Decimal] = mapped_column(default=Decimal(0))
    """What was charged for the tasks that were submitted with this key."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Task(Base):
    """One request for one image. `storage.tasks` is the only module that changes its status."""

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint("progress BETWEEN 0 AND 100", name="progress_is_percent"),
        CheckConstraint("(status = 'processing') = (lease_until IS NOT NULL)", name="lease"),
        # An erased task keeps the key of its image until the image is deleted.
        CheckConstraint(
            "CASE WHEN erased_at IS NULL THEN (status = 'completed') = (image_key IS NOT NULL)"
            " ELSE status = 'completed' OR image_key IS NULL END",
            name="image",
        ),
        CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name="error"),
        CheckConstraint("losses BETWEEN 0 AND attempt", name="losses_are_of_attempts"),
        CheckConstraint(
            "erased_at IS NULL OR finished_at IS NOT NULL AND prompt = '' AND seed = 0"
            " AND num_nonnulls(rewritten_prompt, reasoning, aspect_ratio, callback_url, request_id,"
            " image_url, image_sha256, error_message) = 0",
            name="erased_holds_nothing",
        ),
        # Each look of claim, repair and customer has its own index, small because partial.
        Index("ix_tasks_fair", "fair_tag", "id", postgresql_where=text("status = 'pending'")),
        Index("ix_tasks_lease", "lease_until", postgresql_where=text("status = 'processing'")),
        Index(
            "ix_tasks_deadline",
            "deadline_at",
            postgresql_where=text(
                "status IN ('pending', 'processing') AND deadline_at IS NOT NULL"
            ),
        ),
        Index("ix_tasks_account", "account_id", "created_at", "id"),
        Index("ix_tasks_newest", "created_at", "id"),
        # Without it an account's list would wade through all that it ever had.
        Index(
            "ix_tasks_shown",
            "account_id",
            "created_at",
            "id",
            postgresql_where=text("erased_at IS NULL"),
        ),
        Index(
            "ix_tasks_to_erase",
            "finished_at",
            postgresql_where=text("erased_at IS NULL AND finished_at IS NOT NULL"),
        ),
        Index(
            "ix_tasks_image_to_delete",
            "id",
            postgresql_where=text("erased_at IS NOT NULL AND image_key IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"))
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    dialect: Mapped[str]
    request_id: Mapped[str | None]
    """The X-Request-ID of the request that submitted it, so that logs can be followed."""

    model: Mapped[str]
    prompt: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    aspect_ratio: Mapped[str | None]
    """As the customer wrote it; None where the size was given in pixels or not at all."""
    seed: Mapped[int] = mapped_column(BigInteger)
    """The seed that is drawn, chosen for the customer where `seed_given` is false."""
    seed_given: Mapped[bool]
    steps: Mapped[int]
    """Denoising steps."""
    image_format: Mapped[ImageFormat]
    callback_url: Mapped[str | None]
    prompt_extend: Mapped[bool] = mapped_column(server_default=false())
    """Whether the prompt is rewritten before it is drawn."""
    strict_moderation: Mapped[bool] = mapped_column(server_default=false())
    allow_downscale: Mapped[bool] = mapped_column(server_default=false())
    """Whether a smaller image will do where there is no memory for this one."""

    price: Mapped[Decimal]
    user_group: Mapped[str]
    fair_tag: Mapped[float]
    deadline_at: Mapped[datetime | None]
    """Unfinished after this moment, it is cancelled."""

    status: Mapped[TaskStatus] = mapped_column(default=TaskStatus.PENDING)
    progress: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of claims so far: the fencing token of the worker that holds the last one."""
    losses: Mapped[int] = mapped_column(default=0)
    """Claims that ended with a lost worker or an unreachable image store."""
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]

    rewritten_prompt: Mapped[str | None]
    """What is drawn instead of `prompt`; None until it is rewritten, or where that is not asked."""
    reasoning: Mapped[str | None]
    """What the rewriting model thought on the way to `rewritten_prompt`."""
    rewrite_input_tokens: Mapped[int | None]
    rewrite_output_tokens: Mapped[int | None]
    """Those of the reasoning included."""
    rewrite_reasoning_tokens: Mapped[int | None]
    prompt_tokens: Mapped[int | None]
    """Of what was to be drawn, with the turns of the chat around it; known once it is drawn."""
    prompt_tokens_read: Mapped[int | None]
    """How many of `prompt_tokens` the model read; the rest was cut off."""

    image_key: Mapped[str | None]
    image_url: Mapped[str | None]
    image_expires_at: Mapped[datetime | None]
    image_sha256: Mapped[str | None]
    """Of the file, in hexadecimal, so that whoever fetches it can see that it came whole."""
    image_size_bytes: Mapped[int | None]
    image_width: Mapped[int | None]
    """Of the file, in pixels; differs from `width` only where `allow_downscale` allowed it."""
    image_height: Mapped[int | None]
    error_code: Mapped[str | None]
    """The name of a class in `storage.errors`."""
    error_message: Mapped[str | None]

    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    erased_at: Mapped[datetime | None]
    """Since then nothing is left of what the customer wrote or got; see `storage.erasure`."""

    @property
    def downscaled(self) -> bool:
        """Whether the image is smaller than what was asked for."""
        return self.image_width is not None and self.image_width < self.width

    @property
    def image_expired(self) -> bool:
        """Whether the image of a completed task is no longer to be had."""
        return self.image_expires_at is None or self.image_expires_at <= datetime.now(UTC)


class LedgerEntry(Base):
    """One movement of credits. Entries are only ever added; the database refuses anything else."""

    __tablename__ = "ledger_entries"
    __table_args__ = (
        # Charges, which are nearly all of them, have no key.
        Index(
            "ix_ledger_entries_idempotency",
            "account_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        CheckConstraint("(kind = 'charge') = (task_id IS NOT NULL)", name="charge_has_task"),
        CheckConstraint("(kind = 'grant') = (amount > 0)", name="sign"),
        Index("ix_ledger_entries_account", "account_id", "id"),
        Index("ix_ledger_entries_given", "account_id", postgresql_where=text("kind <> 'charge'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"))
    kind: Mapped[EntryKind]
    amount: Mapped[Decimal]
    """Added to the balance: positive for grants, negative for charges."""
    balance_after: Mapped[Decimal]
    actor: Mapped[str]
    """Who moved them: `key:<id>`, `cli`, or `worker`."""
    note: Mapped[str | None]
    task_id: Mapped[str | None] = mapped_column(unique=True)
    """Unique, so a task cannot be charged twice. No foreign key: entries outlive tasks."""
    idempotency_key: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Delivery(Base):
    """A callback that is owed: written in the same commit as the task's final status."""

    __tablename__ = "deliveries"
    __table_args__ = (
        # As many as RETRIES_S in storage.deliveries allows.
        CheckConstraint("attempts BETWEEN 0 AND 4", name="attempts_bounded"),
        CheckConstraint("state <> 'waiting' OR attempts < 4", name="waits_for_an_attempt"),
        Index("ix_deliveries_due", "next_attempt_at", postgresql_where=text("state = 'waiting'")),
        Index("ix_deliveries_account", "account_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """The webhook-id: the same for every attempt, so that receivers can drop repeats."""
    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.id"), unique=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"))
    url: Mapped[str]
    state: Mapped[DeliveryState] = mapped_column(default=DeliveryState.WAITING)
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts that ended, well or badly."""
    claim: Mapped[int] = mapped_column(default=0)
    """Number of times a courier took it: the fencing token of the one that has it."""
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    """When the next attempt is due; while one is under way, when its courier is given up."""
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    delivered_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class DeliveryAttempt(Base):
    """One try of a delivery, as it ended: the log that a customer can read."""

    __tablename__ = "delivery_attempts"
    __table_args__ = (Index("ix_delivery_attempts_delivery", "delivery_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("deliveries.id"))
    status: Mapped[int | None]
    """HTTP's; None where there was no answer."""
    error: Mapped[str | None]
    """None where the receiver answered with 2xx."""
    ended_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class RememberedRequest(Base):
    """A create that may come twice, and the tasks that it became; see `storage.idempotency`."""

    __tablename__ = "remembered_requests"
    __table_args__ = (
        UniqueConstraint("account_id", "idempotency_key"),
        Index(
            "ix_remembered_requests_resend",
            "account_id",
            "fingerprint",
            postgresql_where=text("idempotency_key IS NULL"),
        ),
        Index("ix_remembered_requests_created_at", "created_at"),
        Index("ix_remembered_requests_tasks", "task_ids", postgresql_using="gin"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"))
    idempotency_key: Mapped[str | None]
    """As the caller chose it; None where the caller's library re-sends without one."""
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of what was asked for, and for a request without a key also of whose key asked."""
    resend: Mapped[int] = mapped_column(default=0)
    """The number of the last re-send that was answered from here."""
    task_ids: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class FairClock(Base):
    """The one row that holds virtual time: the largest fair tag that was ever claimed."""

    __tablename__ = "fair_clock"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    virtual_now: Mapped[float]


class BooksCheck(Base):
    """The one row that says what the last look at all the books found; see `storage.books`."""

    __tablename__ = "books_checks"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    checked_at: Mapped[datetime]
    took_s: Mapped[float]
    accounts: Mapped[int]
    faults: Mapped[int]
    completed: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    cancelled: Mapped[int] = mapped_column(BigInteger)
    callbacks_given_up: Mapped[int] = mapped_column(BigInteger)
