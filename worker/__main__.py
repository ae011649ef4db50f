"""`python -m worker`: load the pipeline once, then take jobs in this process until told to stop.

The first SIGTERM or SIGINT lets what was claimed be finished, the second hands it back. With
several devices there is a process for each of them. `python -m worker doctor` needs no servers.
"""

import argparse
import gc
import os
import secrets
import socket
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import structlog

logger = structlog.get_logger()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "doctor"], default="run")
    parser.add_argument(
        "--devices", help="auto, all, or names with commas between them; default: ZIMAGE_DEVICE"
    )
    asked = parser.parse_args()
    if asked.command == "doctor":
        from worker import doctor

        return doctor.main()

    from storage import objects
    from storage.errors import StorageUnavailable
    from storage.logs import configure
    from worker import devices
    from worker.settings import settings

    configure("worker")
    try:
        objects.check()
    except objects.TemporaryCredentials as error:
        sys.exit(str(error))
    except StorageUnavailable as error:
        logger.warning("worker.image_store_away", error=str(error.__cause__))
    names = devices.resolve_devices(asked.devices or settings.device)
    if len(names) > 1:
        return devices.run_all(names)
    return draw_on(names[0])


def draw_on(device: str) -> int:
    """Load the model on `device` and take jobs until told to stop. Returns the exit status."""
    from storage.settings import settings as storage_settings

    gc.disable()  # what is imported stays: looking for garbage in it takes a seventh of the start
    # Imported only now: torch takes seconds, and a broken setting should not wait for it.
    from worker import generate, loading, marking, moderation, prompt_extend
    from worker.settings import settings
    from worker.stages import Worker

    gc.freeze()
    gc.enable()

    try:
        device, _ = loading.choose_here(device, settings.dtype)
        moderator = moderation.of_settings(settings, device=device)
        marking.of_settings(settings)
        pipeline = loading.load(
            storage_settings.model,
            device=device,
            dtype=settings.dtype,
            switches=loading.switches_of(settings),
        )
    except (
        loading.ModelUnavailable,
        marking.LabelUnusable,
        moderation.RulesUnusable,
        ValueError,
    ) as error:
        sys.exit(str(error))
    about = {"model": pipeline.model, "device": device, "dtype": pipeline.dtype}
    logger.info("worker.loaded", **about)
    if pipeline.model == loading.DEMO:
        logger.warning("worker.demo_model", notice="it draws coloured shapes and nothing else")
    for timing in pipeline.warm_up(loading.warmup_sizes(settings, device), settings.batch_max):
        logger.info("worker.warmed_up", **asdict(timing))

    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    worker = Worker(
        name,
        pipeline,
        moderation=moderator,
        rewriter=prompt_extend.of_settings(
            settings, pipeline.text_encoder, pipeline.tokenizer, pipeline.weights_lock
        ),
        rewrites_max=prompt_extend.concurrency(settings),
    )

    def facts() -> dict[str, object]:
        memory = {f"memory_{what}_mb": mb for what, mb in pipeline.memory_mb().items()}
        limits = {f"{w}x{h}": most for (w, h), most in pipeline.batch_limits.items()}
        return {
            **about,
            **memory,
            "device_name": loading.device_name(device),
            "batch_limits": limits,
            "started_at": started_at,
        }

    generate.serve(worker, facts)
    logger.info("worker.stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
