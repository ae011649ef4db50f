"""A finished task, told to the customer's URL: public HTTPS only, 10 s, then after 1, 2 and 4 s.

The body is what `GET /v1/tasks/{id}` answers. It is signed as Standard Webhooks 1.0.0 asks, which
receivers that know only EvoLink's callbacks ignore.
"""

import asyncio
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

import httpcore
from standardwebhooks import Webhook

from api import egress
from api.answers import encode
from api.bounded_stream import AnswerTooLong
from api.dialects import evolink
from storage.deliveries import Attempt
from storage.errors import InvalidRequest
from storage.sealing import unseal

TIMEOUT_S = 10
"""Of a whole attempt, from looking up the name to the status line. Source: EvoLink's manual."""
USER_AGENT = "zimage-callbacks/1"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: `error` None is success; `final`: no other attempt can help."""

    status: int | None = None
    error: str | None = None
    final: bool = False


async def deliver(
    client: httpcore.AsyncConnectionPool, attempt: Attempt, *, timeout_s: float = TIMEOUT_S
) -> Outcome:
    """Try one delivery once. Never raises for what a receiver or its network does.

    An error says what the customer can know: no address, no name server, no word of the answer.
    """
    body = encode(evolink.render_task(attempt.task))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "Accept-Encoding": "identity",
        **sign(attempt, body, datetime.now(UTC)),
    }
    try:
        receiver = egress.parse(attempt.delivery.url)
        headers["Host"] = receiver.authority
        async with asyncio.timeout(timeout_s):
            async with client.stream(
                "POST", receiver.url, headers=list(headers.items()), content=body
            ) as answer:
                # Only the status counts; what else the receiver sends is not read.
                status = answer.status
    except (egress.ForbiddenAddress, InvalidRequest) as error:
        return Outcome(error=str(error), final=True)
    except egress.UnknownName:
        return Outcome(error="the host name cannot be resolved")
    except TimeoutError:
        return Outcome(error=f"no answer within {timeout_s:g} s")
    except ssl.SSLCertVerificationError as error:
        return Outcome(error=f"the certificate is not trusted: {error.verify_message}")
    except ssl.SSLError:
        return Outcome(error="no TLS connection")
    except AnswerTooLong:
        return Outcome(error=f"no answer within {egress.ANSWER_MAX_BYTES} bytes")
    except (OSError, httpcore.NetworkError):
        return Outcome(error="no connection")
    except httpcore.ProtocolError:
        return Outcome(error="not an HTTP answer")
    if 200 <= status < 300:
        return Outcome(status)
    return Outcome(status, f"answered {status}")


def sign(attempt: Attempt, body: bytes, now: datetime) -> dict[str, str]:
    """The headers of Standard Webhooks 1.0.0, one signature for each secret that is in force.

    Raises: CannotUnseal.
    """
    message_id = attempt.delivery.id
    signatures = [
        Webhook(unseal(secret)).sign(message_id, now, body.decode()) for secret in attempt.secrets
    ]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
