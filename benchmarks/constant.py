"""The yardstick: the same framework on the same server, answering the same bytes without doing
anything. `python -m benchmarks.constant` serves it at ZIMAGE_PORT."""

import uvicorn
from fastapi import FastAPI
from starlette.responses import Response

from api.settings import settings

CREATED = (
    b'{"created":1757165031,"id":"task-unified-1757165031-uyujaw3d","model":"z-image-turbo",'
    b'"object":"image.generation.task","progress":0,"status":"pending","type":"image",'
    b'"task_info":{"can_cancel":true,"estimated_time":10},'
    b'"usage":{"billing_rule":"per_call","credits_reserved":15,"user_group":"default"}}'
)

app = FastAPI()


@app.post("/v1/images/generations")
async def create() -> Response:
    return Response(CREATED, media_type="application/json")


@app.get("/v1/tasks/{task_id}")
async def get_task(task_id: str) -> Response:
    return Response(CREATED, media_type="application/json")


@app.get("/ready")
async def ready() -> Response:
    return Response()


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
    )
