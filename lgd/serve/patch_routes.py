"""Urls of single images: those that are sent, and those of the feature store."""

import functools

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response

from lgd.serve.calls import IMAGE_BODY, ImageBody, ImageMpp, K, Limit, Names, Offset, read_mpp, split_names
from lgd.serve.gallery import StoreGallery
from lgd.serve.names import UnknownName
from lgd.serve.neighbours import Filters
from lgd.serve.network import Network

CACHED = {"Cache-Control": "private, max-age=3600"}
"""Of pictures: what they show is not changed while the service runs."""
_NO_STORE = "this service has no feature store: start it with --store"


class PatchRoutes:
    """The urls, of a network and the patches of its store."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def make_router(self) -> APIRouter:
        """What answers them."""
        router = APIRouter()
        router.get("/model", summary="What the network predicts, and what the store holds")(self.describe)
        router.post("/predict", summary="Label and probabilities of an H&E image", openapi_extra=IMAGE_BODY)(
            self.predict
        )
        router.post("/query", summary="The nearest known IHC of an H&E image", openapi_extra=IMAGE_BODY)(self.query)
        router.get("/patches", summary="Patches of the store")(self.list_patches)
        router.get("/patches/{patch}/{role}.jpg", summary="The H&E (he) or IHC (ihc) of a patch")(self.draw)
        router.post("/patches/{patch}/query", summary="The nearest known IHC of a patch's H&E, of other slides")(
            self.query_stored
        )
        return router

    @property
    def gallery(self) -> StoreGallery:
        """The patches; raises `UnknownName` where there is no store."""
        if self.network.gallery is None:
            raise UnknownName(_NO_STORE)
        return self.network.gallery

    async def describe(self) -> dict[str, object]:
        """What the network predicts, and what the store holds."""
        return self.network.describe()

    async def predict(self, image: ImageBody, mpp: ImageMpp = "") -> dict[str, object]:
        """As `lgd predict --json`."""
        return await self.network.predict(image, read_mpp(mpp))

    async def query(
        self, image: ImageBody, k: K = 5, label: Names = "", split: Names = "", mpp: ImageMpp = ""
    ) -> dict[str, object]:
        """As `lgd query --json`, with the images of the neighbours, hubs, and what chance would give."""
        filters = Filters(k=k, labels=split_names(label), splits=split_names(split))
        return await self.network.query(image, read_mpp(mpp), filters)

    async def list_patches(
        self, offset: Offset = 0, limit: Limit = 60, split: Names = "", label: Names = ""
    ) -> dict[str, object]:
        """Patches in the order of the store."""
        page = await run_sync(functools.partial(self.gallery.list_patches, offset, limit, split, label))
        return page._asdict()

    async def draw(self, patch: str, role: str) -> Response:
        """The middle of a patch, as JPEG."""
        if role not in ("he", "ihc"):
            raise UnknownName("a patch has he.jpg and ihc.jpg")
        stored = self.gallery.find(patch)
        return Response(await run_sync(self.gallery.draw, stored, role), media_type="image/jpeg", headers=CACHED)

    async def query_stored(self, patch: str, k: K = 5) -> dict[str, object]:
        """The student sees the patch's H&E alone; its own IHC and its slide are left out."""
        return await self.network.query_stored(patch, Filters(k=k))
