"""Watches Google's metadata server for the announcement that this machine will be taken away."""

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
# The value of each key while nothing is announced. `preempted` changes for spot machines.
CALM = {"maintenance-event": "NONE", "preempted": "FALSE"}
PRODUCT = Path("/sys/class/dmi/id/product_name")
EVERY_SECONDS = 5.0  # a spot machine ends 30 seconds after the announcement

_log = logging.getLogger("vlp_jax.parallel")


def on_google_cloud() -> bool:
    """Whether this is a Compute Engine machine, according to its firmware; uses no network."""
    try:
        return "Google" in PRODUCT.read_text()
    except OSError:
        return False


class MaintenanceWatch:
    """Sends this process SIGTERM when the end of its machine is announced, so that the run saves.

    A context manager. It does nothing outside of Google Cloud.

    Args:
      url: URL of the instance's metadata; None for Google's on a machine of Google Cloud.
      every_seconds: time between two requests.
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
        """Asks the server; returns the announcement as "key=value", None if there is none.

        Raises:
          OSError: the server cannot be reached.
        """
        for key, calm in CALM.items():
            request = urllib.request.Request(
                f"{self._url}/{key}", headers={"Metadata-Flavor": "Google"}
            )
            try:
                with urllib.request.urlopen(request, timeout=self._every) as answer:
                    value = answer.read().decode().strip()
            except urllib.error.HTTPError as error:
                if error.code == 404:  # this kind of machine does not have the key
                    continue
                raise
            if value.upper() != calm:
                return f"{key}={value}"
        return None
