"""Notices of Google's metadata server that this machine will be taken away."""

from __future__ import annotations

import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"
# Value of each key while all is well. A spot machine that is taken away says so in `preempted`.
CALM = {"maintenance-event": "NONE", "preempted": "FALSE"}
PRODUCT = Path("/sys/class/dmi/id/product_name")
EVERY_SECONDS = 5.0  # a spot machine has 30 seconds

_log = logging.getLogger("vlp_jax.parallel")


def on_google_cloud() -> bool:
    """Whether this is a machine of Compute Engine, as its firmware says; asks no network."""
    try:
        return "Google" in PRODUCT.read_text()
    except OSError:
        return False


class MaintenanceWatch:
    """Sends this process SIGTERM when its machine is announced to go, so that it saves and stops.

    Elsewhere than on Google Cloud there is nobody to ask, and it does nothing. A context manager.

    Args:
      url: of the instance's metadata; None for Google's own if this is one of its machines.
      every_seconds: between two questions.
    """

    def __init__(self, url: str | None = None, every_seconds: float = EVERY_SECONDS):
        self._url = url or (METADATA if on_google_cloud() else None)
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="maintenance", daemon=True)

    def __enter__(self) -> Self:
        if self._url:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._every)

    def _watch(self) -> None:
        reachable = True
        while not self._stop.wait(self._every):
            try:
                event = self.event()
            except OSError as error:  # urllib's errors are OSErrors; it may be back next time
                if reachable:
                    _log.warning("no maintenance notices: %s cannot be read: %s", self._url, error)
                reachable = False
                continue
            reachable = True
            if event:
                _log.warning("this machine is announced to go (%s): saving and stopping", event)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def event(self) -> str | None:
        """What is announced, as "key=value"; None if nothing is.

        Raises:
          OSError: the server cannot be asked.
        """
        for key, calm in CALM.items():
            request = urllib.request.Request(
                f"{self._url}/{key}", headers={"Metadata-Flavor": "Google"}
            )
            try:
                with urllib.request.urlopen(request, timeout=self._every) as answer:
                    value = answer.read().decode().strip()
            except urllib.error.HTTPError as error:
                if error.code == 404:  # a kind of machine that has no such notice
                    continue
                raise
            if value.upper() != calm:
                return f"{key}={value}"
        return None
