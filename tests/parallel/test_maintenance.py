"""A notice of the metadata server becomes a SIGTERM."""

import http.server
import signal
import threading

import pytest

from vlp_jax.parallel import maintenance
from vlp_jax.parallel.maintenance import MaintenanceWatch


@pytest.fixture
def server():
    """A metadata server: its `values` by key, and the `asked` paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.rpartition("/")[2]
            asked.append((key, self.headers.get("Metadata-Flavor")))
            known = key in values
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values.get(key, "").encode())

        def log_message(self, *arguments):
            pass

    values, asked = {"maintenance-event": "NONE"}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.values, server.asked = values, asked
    server.url = f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/instance"
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_is_a_sigterm(server, key, value):
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        with MaintenanceWatch(server.url, every_seconds=0.05):
            assert not received.wait(0.3)
            server.values[key] = value
            assert received.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("maintenance-event", "Google") in server.asked  # the server insists on the header


def test_a_server_that_is_away_is_told_once_and_asked_again(server, caplog):
    watch = MaintenanceWatch("http://127.0.0.1:9/x", every_seconds=0.02)
    with watch:
        threading.Event().wait(0.3)
    assert len([r for r in caplog.records if "no maintenance notices" in r.message]) == 1
    assert MaintenanceWatch(server.url).event() is None


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(maintenance, "PRODUCT", tmp_path / "absent")
    assert not maintenance.on_google_cloud()
    with MaintenanceWatch() as watch:
        assert not watch._thread.is_alive()
    (tmp_path / "absent").write_text("Google Compute Engine\n")
    assert maintenance.on_google_cloud()
