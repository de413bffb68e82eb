import * as ort from "./npm/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./npm/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { Device } from "./hydra.js";

ort.env.wasm.wasmPaths = new URL("./npm/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that isolate the page's origin

const at = (id) => document.getElementById(id);
let device = null; // a promise, made anew for another file

async function load() {
  const file = at("user").files[0];
  return Device.load("phone/", file ? JSON.parse(await file.text()) : null, { ort, Tokenizer });
}

at("user").addEventListener("change", () => (device = null));

document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = at("question").value;
  at("answers").replaceChildren();
  try {
    at("status").textContent = "asking the server …";
    const body = JSON.stringify({ input }); // all that leaves this page
    const headers = { "content-type": "application/json" };
    const reply = await fetch("candidates", { method: "POST", headers, body });
    if (!reply.ok) throw new Error(await reply.text());
    const { candidates } = await reply.json();
    at("status").textContent = "scoring on this device …";
    const { chosen, scores } = await (await (device ??= load())).choose(input, candidates);
    window.picked = { candidates, chosen, scores };
    candidates.forEach((own, place) => {
      const item = document.createElement("li");
      item.textContent = own.answer ?? own.text;
      if (place === chosen) item.innerHTML = `<strong>${item.innerHTML}</strong>`;
      at("answers").append(item);
    });
    at("status").textContent = `picked: ${candidates[chosen].answer}`;
  } catch (error) {
    device = null;
    at("status").textContent = `failed: ${error.message}`;
  }
});
