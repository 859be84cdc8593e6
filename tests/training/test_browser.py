"""The page that runs a student in a browser, in a headless Chromium."""

import functools
import html
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raptor_hf import RaptorForImageClassification
from raptor_hf.data.images import load_image_processor, open_images

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "training" / "browser"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web" / "dist"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STUDENT = ROOT / "model_cards" / "digits-k3"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="run `npm install --prefix training/browser`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page, the runtime, files of an export and an image, as a server would have them."""
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("browser")
    shutil.copyfile(PAGE / "index.html", folder / "index.html")
    (folder / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    (folder / "node_modules" / "onnxruntime-web" / "dist").symlink_to(RUNTIME)
    (folder / "files").mkdir()
    model = RaptorForImageClassification.from_pretrained(STUDENT)
    onnx_files.save_onnx(model, folder / "files" / "float32.onnx")
    for precision in ("int8_dynamic", "int4"):
        onnx_files.quantize_onnx(folder / "files" / "float32.onnx", folder / "files" / f"{precision}.onnx", precision)
    processor = load_image_processor(str(STUDENT)).to_dict()
    facts = {"files": [], "image_processor": processor, "labels": [f"digit {index}" for index in range(10)]}
    (folder / "files" / "export.json").write_text(json.dumps(facts))
    open_images("digits", "test").decode(3)[0].save(folder / "image.png")
    return folder


# a page around the page, which sends what that shows once it is done; `--dump-dom` does not wait for WebAssembly
WATCHER = """<iframe id="page"></iframe><script>
  const page = document.getElementById("page");
  page.src = "index.html" + location.search;
  const watch = setInterval(() => {
    const status = page.contentDocument?.getElementById("status")?.textContent ?? "";
    if (/^error|: [0-9.]+ ms$/.test(status)) {
      clearInterval(watch);
      fetch("/shown", { method: "POST", body: page.contentDocument.documentElement.outerHTML });
    }
  }, 100);
</script>"""


@pytest.fixture
def shown(folder, tmp_path) -> Iterator[Callable[[str], str]]:
    """What the page shows in the browser, with so much after its address."""
    pages: queue.Queue[str] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            pages.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (folder / "watcher.html").write_text(WATCHER)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browsers = []

    def show(query: str) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        address = f"http://127.0.0.1:{server.server_port}/watcher.html{query}"
        browsers.append(subprocess.Popen([BROWSER, *flags, address], stderr=subprocess.DEVNULL))
        return pages.get(timeout=300)

    yield show
    for browser in browsers:
        browser.terminate()
        browser.wait()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-3), ("int8_dynamic", 0.3), ("int4", 2.0)])
def test_page_shows_what_the_student_sees(shown, precision, tolerance):
    text = shown(f"?model={precision}.onnx&image=image.png")
    status = re.search(r'<p id="status">(.*?)</p>', text)[1]
    assert re.fullmatch(rf"{precision}\.onnx: [\d.]+ ms", status)
    logits = torch.tensor(json.loads(html.unescape(re.search(r'data-logits="(.*?)"', text)[1])))
    image = open_images("digits", "test").decode(3)[0]
    inputs = load_image_processor(str(STUDENT))(images=[image], return_tensors="pt")
    with torch.no_grad():
        expected = RaptorForImageClassification.from_pretrained(STUDENT)(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert f"digit {expected.argmax().item()}</li>" in text.split("<ol")[1].split("</li>")[0] + "</li>"


def test_page_tells_what_is_missing(shown):
    text = shown("?files=nowhere")
    assert re.search(r'<p id="status">error: .+</p>', text)
