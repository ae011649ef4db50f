"""The real servers, started once for all tests, and the service on a real socket before them."""

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest
import trustme

from deploy import servers
from tests import name_server

gc.disable()  # until all is imported, which stays: see `pytest_collection_finish`

# Two test processes with torch would otherwise spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The settings are read when the first module of the service is imported, so the servers come first.
_stack = ExitStack()
_folder = Path(tempfile.mkdtemp(prefix="zimage-tests-"))
_folder.chmod(0o755)  # PostgreSQL may have to run as another user
_stack.callback(shutil.rmtree, _folder, ignore_errors=True)
os.environ.update(_stack.enter_context(servers.running(_folder, durable=False)))

RECEIVER_HOST = "127.0.0.2"
"""The one address of the loopback network that callbacks may reach, as an operator may allow."""
authority = trustme.CA()
authority.cert_pem.write_to_path(str(_folder / "ca.pem"))
names = _stack.enter_context(name_server.serving())
"""Whom the service asks for the addresses of callbacks' hosts."""

os.environ.update(
    ZIMAGE_DATA_DIR=str(_folder / "data"),
    ZIMAGE_CALLBACK_ALLOWED_NETWORKS=f'["{RECEIVER_HOST}/32"]',
    ZIMAGE_CALLBACK_CA_FILE=str(_folder / "ca.pem"),
    ZIMAGE_CALLBACK_NAMESERVERS=f'["{names.address}"]',
    ZIMAGE_AUTH_FAILURES_PER_MINUTE="1000000",  # all tests come from one address
    ZIMAGE_GROUP_WEIGHTS='{"heavy": 3}',
    ZIMAGE_LEASE_S="2",
    ZIMAGE_STORE_TIMEOUT_S="1",
    ZIMAGE_MODEL="demo",
)

import alembic.command  # noqa: E402
import httpx  # noqa: E402
import uvicorn  # noqa: E402
from alembic.config import Config  # noqa: E402
from PIL import Image  # noqa: E402
from rq.serializers import JSONSerializer  # noqa: E402
from sqlalchemy import func, select, text  # noqa: E402

from api.app import create_app  # noqa: E402
from api.connections import BoundedProtocol  # noqa: E402
from benchmarks.sleeper import Unbatched  # noqa: E402
from storage import accounts, ledger, objects, queue, tasks  # noqa: E402
from storage.database import engine, transaction  # noqa: E402
from storage.models import Account, Base, ImageFormat, LedgerEntry, Task  # noqa: E402
from tests import warm as warming  # noqa: E402
from worker import generate, moderation  # noqa: E402
from worker.drawing import Drawing, Picture, Pipeline, Rewriter  # noqa: E402
from worker.settings import settings  # noqa: E402
from worker.stages import Worker  # noqa: E402

ROOT = Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays, so nobody has to look for garbage in it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    engine.dispose()
    queue.connection.close()
    _stack.close()


@pytest.fixture(scope="session", autouse=True)
def _schema() -> None:
    alembic.command.upgrade(Config(toml_file=ROOT / "pyproject.toml"), "head")
    objects.make_bucket()


@pytest.fixture(autouse=True)
def _empty() -> None:
    """Every test begins with nothing in the database and nothing in Redis."""
    tables = set(Base.metadata.tables) - {"fair_clock"}
    with engine.begin() as connection:
        # Every other row belongs to an account, and half of the tests need none.
        if connection.scalar(select(Account.id).limit(1)) is not None:
            # Without triggers, one of which forbids this; TRUNCATE takes ten times as long.
            emptying = "; ".join(f"DELETE FROM {table}" for table in tables)
            connection.execute(text(f"SET LOCAL session_replication_role = replica; {emptying}"))
            connection.execute(text("UPDATE fair_clock SET virtual_now = 0"))
            connection.execute(text("ALTER TABLE ledger_entries ALTER id RESTART"))
    queue.connection.flushdb()


@pytest.fixture(scope="session")
def warm() -> Iterator[warming.Warm]:
    """Starts processes of the service that do not draw."""
    with warming.imported(*warming.SERVICE) as warm:
        yield warm


@pytest.fixture(scope="session")
def warm_model() -> Iterator[warming.Warm]:
    """Starts processes that draw, and that must not look for a network."""
    environment = {
        # For those whose memory is limited: so that what is given back is the system's again.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }
    with warming.imported(*warming.MODEL, offline=True, **environment) as warm:
        yield warm


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The application behind a real socket: a client sees what a customer sees, when it is sent."""
    config = uvicorn.Config(
        create_app(), port=0, http=BoundedProtocol, log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@dataclass(frozen=True)
class Customer:
    """An account, a key of it, and a client that shows the key."""

    id: str
    key: str
    key_id: str
    http: httpx.Client

    def books(self) -> tuple[Decimal | int, Decimal | int]:
        """Balance and reserved."""
        with transaction() as session:
            account = session.get_one(Account, self.id)
            return account.balance, account.reserved

    def task(self, task_id: str) -> Task:
        with transaction() as session:
            return session.get_one(Task, task_id)


NewCustomer = Callable[..., Customer]


@pytest.fixture
def new_customer(server: str) -> Iterator[NewCustomer]:
    """Make a customer with so many credits; the rest is what accounts and keys are made with."""
    clients = []

    def make(
        balance: int = 1500,
        *,
        user_group: str = "default",
        unfinished_max: int | None = None,
        requests_per_minute: int | None = None,
        models: list[str] | None = None,
        admin: bool = False,
    ) -> Customer:
        with transaction() as session:
            account = accounts.create(
                session, "a customer", user_group=user_group, unfinished_max=unfinished_max
            )
            if balance:
                ledger.grant(session, account.id, Decimal(balance), actor="test")
            key, secret = accounts.issue_key(
                session,
                account.id,
                requests_per_minute=requests_per_minute,
                models=models,
                admin=admin,
            )
        http = httpx.Client(
            base_url=server,
            headers={"Authorization": f"Bearer {secret}"},
            timeout=30,
            verify=False,  # plain HTTP: reading the certificates would only take its time
        )
        clients.append(http)
        return Customer(account.id, secret, key.id, http)

    yield make
    for http in clients:
        http.close()


@pytest.fixture
def customer(new_customer: NewCustomer) -> Customer:
    """A customer with 1500 credits and no limits."""
    return new_customer()


@pytest.fixture
def operator(new_customer: NewCustomer) -> Customer:
    """Whoever may use `/admin`."""
    return new_customer(0, admin=True)


@pytest.fixture
def anyone(server: str) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=server, timeout=30, verify=False) as http:
        yield http


class Paint:
    """A pipeline that takes no time: one colour, given by the seed, in eight steps."""

    def __call__(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        seed: int,
        steps: int,
        on_step: Callable[[int, int], None],
    ) -> Image.Image:
        for step in range(steps):
            on_step(step + 1, steps)
        colour = (seed % 256, seed // 256 % 256, seed // 65536 % 256)
        return Image.new("RGB", (width, height), colour)


DrawOne = Callable[..., Image.Image]


class OneByOne(Unbatched):
    """The pipeline of a function that draws one image and knows no batches.

    It is called with the prompt and `width`, `height`, `seed`, `steps`, and an `on_step` of
    (done, steps); what it raises is the drawing's end.
    """

    def __init__(self, draw_one: DrawOne) -> None:
        self._draw_one = draw_one

    def _drawn(self, drawing: Drawing) -> Picture | BaseException:
        try:
            image = self._draw_one(
                bytes(drawing.reading.tokens).decode(),
                width=drawing.width,
                height=drawing.height,
                seed=drawing.seed,
                steps=drawing.steps,
                on_step=lambda done, steps: drawing.on_step(done),
            )
        except BaseException as error:
            return error
        return lambda: image


def pipeline_of(drawn_by: Pipeline | DrawOne) -> Pipeline:
    return OneByOne(drawn_by) if callable(drawn_by) else drawn_by


def employ(
    pipeline: Pipeline | DrawOne,
    *,
    name: str = "tester",
    rewriter: Rewriter | None = None,
    rewrites_max: int = 1,
) -> Worker:
    """Let a worker with `pipeline` do the jobs of this process; whoever calls this closes it."""
    worker = Worker(
        name,
        pipeline_of(pipeline),
        moderation=MODERATION,
        rewriter=rewriter,
        rewrites_max=rewrites_max,
    )
    generate.employ(worker)
    return worker


MODERATION = moderation.of_settings(settings, device="cpu")

Work = Callable[..., None]


@pytest.fixture
def work() -> Work:
    """Do what is enqueued as a worker would, with `pipeline`, at most `max_jobs` of it."""

    def run(
        pipeline: Pipeline | DrawOne | None = None,
        *,
        max_jobs: int | None = None,
        name: str = "tester",
        rewriter: Rewriter | None = None,
    ) -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        connection = queue.connect()
        worker = employ(pipeline or Paint(), name=name, rewriter=rewriter)
        try:
            while True:
                loop = generate.JobLoop(
                    [queue.NAME], connection=connection, serializer=JSONSerializer
                )
                loop.work(burst=True, max_jobs=max_jobs, logging_level="WARNING")
                worker.drain()  # whatever fails on the way may ring again
                if max_jobs is not None or queue.count() == 0:
                    break
        finally:
            worker.close()
            connection.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


class Atelier:
    """A worker beside the test, which draws whatever is submitted until it is closed."""

    def __init__(self, pipeline: Pipeline | DrawOne, rewriter: Rewriter | None = None) -> None:
        self._worker = employ(pipeline, rewriter=rewriter)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work_until_closed)
        self._thread.start()

    def draw_with(self, pipeline: Pipeline | DrawOne) -> None:
        """Draw with another pipeline from the next task on."""
        self._worker.pipeline = pipeline_of(pipeline)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._worker.close()

    def _work_until_closed(self) -> None:
        while not self._closing.wait(0.01):
            if self._worker.wait_until_wanted(0.01):
                self._worker.take()


@pytest.fixture
def drawing() -> Iterator[Atelier]:
    """A worker beside the test, which draws whatever is submitted until the test ends."""
    atelier = Atelier(Paint())
    yield atelier
    atelier.close()


class Canvas:
    """A pipeline that begins and then draws for ever, until its task is taken away."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __call__(
        self, *_: object, on_step: Callable[[int, int], None], **__: object
    ) -> Image.Image:
        self.begun.set()
        while True:
            on_step(1, 8)
            threading.Event().wait(0.01)


@pytest.fixture
def canvas(drawing: Atelier) -> Canvas:
    """What the worker beside the test draws with instead of paint."""
    canvas = Canvas()
    drawing.draw_with(canvas)
    return canvas


@pytest.fixture
def submit() -> Callable[..., Task]:
    """Submit a task for a customer without HTTP, with its job."""

    def run(customer: Customer, **request: object) -> Task:
        asked = {"prompt": "a cat", "width": 64, "height": 64, "image_format": ImageFormat.PNG}
        submission = tasks.Submission(
            account_id=customer.id,
            api_key_id=customer.key_id,
            images=(tasks.ImageRequest(**(asked | request)),),  # type: ignore[arg-type]
            dialect="test",
            price=Decimal(15),
        )
        with transaction() as session:
            (outcome,) = tasks.submit_many(session, [submission])
        if isinstance(outcome, Exception):
            raise outcome
        queue.ring(1)
        return outcome.tasks[0]

    return run


def assert_untouched(customer: Customer, balance: int = 1500) -> None:
    """Nothing was charged, reserved, written or enqueued for `customer`."""
    assert customer.books() == (Decimal(balance), Decimal(0))
    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Task)) == 0
        charges = select(func.count()).where(LedgerEntry.task_id.is_not(None))
        assert session.scalar(charges) == 0
    assert queue.count() == 0


@contextmanager
def case(name: str) -> Iterator[None]:
    """One of several cases in a test; it is named if it fails."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the case: {name}")
        raise


@pytest.fixture(autouse=True)
def _books_balance() -> Iterator[None]:
    """Whatever a test does, the books balance afterwards."""
    yield
    with transaction() as session:
        books = ledger.check_books(session)
    assert books.balanced, books.faults
