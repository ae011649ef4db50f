"""The OpenAI Images API, as its own Python library calls it, under `/openai/v1`.

`POST /openai/v1/images/generations`, plain or streamed, `GET /openai/v1/models` and
`GET /openai/v1/models/{id}`. The call holds the line until the images are there.

Source: the `openai` package for Python, version 3.52.0: what `images.generate` sends, what its
answers and events are parsed into, which errors it raises, and what it re-sends by itself.

Our choice: `/openai` before `/v1`, because EvoLink's create has the same address and another
answer; links unless `b64_json` is asked for, and no links in a stream; 1024x1024 for no size and
for `auto`; at most 4 images, drawn with `seed`, seed + 1 and so on, where `seed` is a field of our
own. `quality`, `style`, `output_compression`, `user`, `safety_identifier` and, from others on this
address, `negative_prompt` are checked and change nothing in the image; a transparent background,
GIF and SVG are refused rather than answered with something else. `moderation` is `auto` or `low`,
and both are the moderation that is always on, which nothing here turns off or makes stricter. Of
several images those that could be drawn are answered, and `failures` says why the others could not.

`usage.input_tokens` counts the prompt once, however many images it is drawn for, and
`prompt_tokens_read` says how many of them the model read; output tokens are 0: an image has one
price, and `usage.credits_used` says it. With `allow_downscale`, a field of our own, an image may be
smaller than was asked for: it says its `size` beside `downscaled`, and so does the answer, of its
smallest image.

There are no previews: workers hand over finished images only, and anything else would be a fake. So
a stream has no `partial_image` events, whatever `partial_images` asks for, and one `completed`
event per image.
"""

from fastapi import APIRouter

from api.dialects import routing
from api.dialects.openai import routes
from api.dialects.openai.refusals import ERRORS, render_error
from api.dialects.openai.routes import NAME

__all__ = ["ERRORS", "NAME", "render_error", "routers"]


def routers() -> list[APIRouter]:
    answered = [routes.create_router, routes.models_router]
    return [*answered, routing.close(answered, "/openai/v1", render_error)]
