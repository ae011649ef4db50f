"""The API of the peers: `uvicorn benchmarks.peers.app:app`."""

from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.concurrency import run_in_threadpool

from benchmarks.peers import images
from benchmarks.peers.jobs import enqueue
from benchmarks.peers.rows import PRICE, Account, ApiKey, AsyncSessions, Task, hashed

app = FastAPI()


class CreateTask(BaseModel):
    model: str
    prompt: str


class TaskRead(BaseModel):
    id: UUID
    status: str
    url: str | None = None


async def bearer(authorization: Annotated[str, Header()]) -> str:
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise HTTPException(401, "A bearer key is needed")
    return key


async def account_id(session: AsyncSession, key: str) -> UUID:
    found = await session.scalar(select(ApiKey.account_id).where(ApiKey.hash == hashed(key)))
    if found is None:
        raise HTTPException(401, "The key is not known")
    return found


@app.post("/v1/images/generations", status_code=201)
async def create(body: CreateTask, key: Annotated[str, Depends(bearer)]) -> TaskRead:
    async with AsyncSessions.begin() as session:
        payer = await account_id(session, key)
        account = await session.get_one(Account, payer, with_for_update=True)
        if account.balance - account.reserved < PRICE:
            raise HTTPException(402, "Not enough credits")
        account.reserved += PRICE
        task = Task(account_id=account.id, prompt=body.prompt, status="pending")
        session.add(task)
    await run_in_threadpool(enqueue, str(task.id))
    return TaskRead(id=task.id, status=task.status)


@app.get("/v1/tasks/{task_id}")
async def read(task_id: UUID, key: Annotated[str, Depends(bearer)]) -> TaskRead:
    async with AsyncSessions() as session:
        reader = await account_id(session, key)
        task = await session.get(Task, task_id)
    if task is None or task.account_id != reader:
        raise HTTPException(404, "There is no such task")
    url = None if task.image_key is None else images.url(task.image_key)
    return TaskRead(id=task.id, status=task.status, url=url)


@app.get("/ready")
async def ready() -> None:
    return None
