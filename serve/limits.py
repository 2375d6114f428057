"""What a server accepts: limits on bodies, images, tensors, waiting and time, and the checks that apply them.

Every check raises `RequestError`, which becomes one HTTP status and one sentence; none quotes an image's content.
"""

import math
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager
from io import BytesIO

import PIL.Image
from pydantic import Field

from dataeff.core.config import Config

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
RETRY_AFTER_S = 1


class RequestError(Exception):
    """A request that is not answered: an HTTP status and one clear sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Limits(Config):
    """Bounds on one request and on the work that may wait."""

    max_body_bytes: int = Field(10 * 2**20, ge=1024, description="largest request body, bytes")
    max_pixels: int = Field(16 * 2**20, ge=1, description="most pixels of the images in one request")
    max_rows: int = Field(256, ge=1, description="most images in one request")
    max_queue: int = Field(512, ge=1, description="most images received and not yet answered; above it, 503")
    timeout_s: float = Field(30.0, gt=0, description="longest time for one request, seconds; above it, 504")


class Admission:
    """Counts the images in the server, so that a flood is refused at once instead of waiting for ever."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.held = 0

    @contextmanager
    def hold(self) -> Iterator["Ticket"]:
        """Admit one request for one image; `Ticket.grow` adds the images that its body turns out to hold."""
        ticket = Ticket(self)
        try:
            ticket.grow(1)
            yield ticket
        finally:
            self.held -= ticket.rows


class Ticket:
    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.rows = 0

    def grow(self, rows: int) -> None:
        """Raise the request's share to `rows` images, or refuse it with 503."""
        more = max(rows - self.rows, 0)
        if self.admission.held + more > self.admission.max_queue:
            raise RequestError(503, f"the server is busy with {self.admission.held} images; try again later")
        self.admission.held += more
        self.rows += more


async def read_body(chunks: AsyncIterable[bytes], declared: str | None, max_bytes: int) -> bytes:
    """The request body, refused with 413 as soon as its declared or its received length exceeds `max_bytes`."""
    too_large = RequestError(413, f"the body is larger than {max_bytes} bytes; send a smaller image or fewer rows")
    if declared is not None and declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def media_type(content_type: str | None) -> str:
    """`"Image/PNG; q=1"` as `"image/png"`; empty if there is none."""
    return (content_type or "").partition(";")[0].strip().lower()


def check_image_type(content_type: str | None) -> None:
    """Refuse, with 415, a content type that is neither an image type we read nor plain bytes."""
    kind = media_type(content_type)
    if kind not in (*IMAGE_TYPES, "application/octet-stream"):
        allowed = ", ".join(IMAGE_TYPES)
        raise RequestError(415, f"Content-Type {kind[:60] or 'missing'!r}: send {allowed} or application/octet-stream")


def decode_image(body: bytes, limits: Limits) -> PIL.Image.Image:
    """Decode a PNG, JPEG or WebP body.

    The size in the header is checked before any pixel is decoded; Pillow bounds compressed text and profiles.

    Raises:
        RequestError: 400 for a body that is no such image or is damaged; 413 for too many pixels.
    """
    unreadable = RequestError(400, "the body is not a readable PNG, JPEG or WebP image (damaged or of another format)")
    if not body:
        raise RequestError(400, "the body is empty; send a PNG, JPEG or WebP image")
    try:
        image = PIL.Image.open(BytesIO(body), formats=IMAGE_FORMATS)
        check_pixels(math.prod(image.size), limits)
        image.load()
    except RequestError:
        raise
    except PIL.Image.DecompressionBombError:
        raise RequestError(413, f"the image has more than the {limits.max_pixels} pixels that are allowed") from None
    except MemoryError:
        raise RequestError(413, "the image is too large to decode") from None
    # Pillow's decoders report damage through many types (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception:
        raise unreadable from None
    return image


def check_pixels(pixels: int, limits: Limits) -> None:
    if pixels > limits.max_pixels:
        raise RequestError(413, f"{pixels} pixels, more than the {limits.max_pixels} that are allowed in one request")


def check_rows(rows: int, limits: Limits) -> None:
    if not 1 <= rows <= limits.max_rows:
        raise RequestError(400, f"{rows} images in one request; send 1 to {limits.max_rows}")


def check_budget(fraction: float) -> float:
    """A budget as a fraction of the full network's multiply-adds, in (0, 1]."""
    if not 0 < fraction <= 1:
        raise RequestError(
            400, f"budget = {fraction:g}; give the fraction of the full network's work allowed, above 0 and up to 1"
        )
    return fraction


def parse_budget(text: str | None) -> float:
    """The `budget` of a query string as a fraction; infinite, no limit, if there is none."""
    if text is None:
        return math.inf
    try:
        fraction = float(text)
    except ValueError:
        raise RequestError(400, f"budget = {text[:40]!r} is no number; give a fraction above 0 and up to 1") from None
    return check_budget(fraction)
