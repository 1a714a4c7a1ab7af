"use strict";

const byId = (id) => document.getElementById(id);
const state = { key: null, turn: 0, heatTurn: 0, image: null, heat: null };

/** Asks the server; an answer that is an error is thrown with the server's own words. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  if ((response.headers.get("content-type") || "").startsWith("application/json")) {
    message = (await response.json()).error || message;
  }
  throw new Error(message);
}

const askJson = (path, content) =>
  ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  });

function say(id, text, kind = "") {
  const line = byId(id);
  line.textContent = text;
  line.className = `status ${kind}`;
}

/** Runs a task, shows what goes wrong, and keeps the button from being pressed twice. */
async function during(status, button, task) {
  if (button) button.disabled = true;
  say(status, "Working …");
  try {
    await task();
  } catch (error) {
    say(status, error.message, "bad");
  } finally {
    if (button) button.disabled = false;
  }
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showImages(list, results) {
  const items = results.map((found) => {
    const image = element("img", {
      src: `/thumbnail/${found.image}`, alt: "", loading: "lazy", width: 256, height: 256,
    });
    const name = element("span", { className: "name", textContent: found.name, title: found.name });
    const score = element("span", {
      className: "score", textContent: `similarity ${found.similarity.toFixed(3)}`,
    });
    const button = element("button", { type: "button" }, image, name, score);
    button.setAttribute("aria-label", `Look at ${found.name}, similarity ${found.similarity.toFixed(3)}`);
    button.addEventListener("click", () => lookAt(`/api/look/${found.image}`, null, `/thumbnail/${found.image}`));
    return element("li", {}, button);
  });
  byId(list).replaceChildren(...items);
}

function showClasses(classes) {
  const items = classes.map((found) => {
    const percent = found.probability * 100;
    const fill = element("span", { className: "fill" });
    fill.style.width = `${percent}%`;
    const button = element("button", { type: "button" }, fill,
      element("span", { className: "text", textContent: found.text }),
      element("span", { className: "share", textContent: `${percent.toFixed(1)} %` }));
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => showHeat(found.text, button));
    return element("li", {}, button);
  });
  byId("classes").replaceChildren(...items);
  if (items.length) {
    showHeat(classes[0].text, items[0].querySelector("button"));
  } else {
    byId("heat-image").hidden = true;
    byId("heat-caption").textContent = "Type a text below to see which region answers it.";
    byId("classes").append(element("li", { className: "quiet", textContent: "No classes were given: type texts below." }));
  }
}

function replaceUrl(slot, url) {
  if (state[slot] && state[slot].startsWith("blob:")) URL.revokeObjectURL(state[slot]);
  state[slot] = url;
  return url;
}

async function showHeat(text, button) {
  const turn = ++state.heatTurn;
  for (const other of document.querySelectorAll(".bars button")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  try {
    const response = await askJson("/api/heat_map", { key: state.key, text });
    const blob = await response.blob();
    if (turn !== state.heatTurn) return;
    const image = byId("heat-image");
    image.src = replaceUrl("heat", URL.createObjectURL(blob));
    image.alt = `The image with the regions marked that answer “${text}”`;
    image.hidden = false;
    byId("heat-caption").textContent = `Which region answers “${text}”`;
  } catch (error) {
    if (turn === state.heatTurn) byId("heat-caption").textContent = error.message;
  }
}

async function lookAt(path, file, shown) {
  const turn = ++state.turn;
  await during("look-status", null, async () => {
    const options = file ? { method: "POST", body: file } : { method: "POST" };
    const answer = await (await ask(path, options)).json();
    if (turn !== state.turn) return;
    state.key = answer.key;
    byId("look-image").src = replaceUrl("image", shown);
    byId("look").hidden = false;
    byId("classes-title").textContent = "What it shows";
    showClasses(answer.classes);
    showImages("look-results", answer.results);
    say("look-status", "");
    if (!file) byId("look-title").scrollIntoView({ block: "start" });
  });
}

function lookAtFile(file) {
  if (!file) return;
  if (file.size > state.maxUpload) {
    say("look-status", `${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; at most ${state.maxUpload / 2 ** 20} MiB are accepted.`, "bad");
    return;
  }
  lookAt("/api/look", file, URL.createObjectURL(file));
}

byId("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during("search-status", event.submitter, async () => {
    const answer = await (await askJson("/api/search", { text: byId("search-text").value })).json();
    showImages("search-results", answer.results);
    if (answer.note) say("search-status", answer.note, "note");
    else say("search-status", `The ${answer.results.length} most similar images.`);
  });
});

byId("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during("compare-status", event.submitter, async () => {
    const texts = byId("compare-texts").value.split("\n").map((text) => text.trim()).filter(Boolean);
    const answer = await (await askJson("/api/compare", { key: state.key, texts })).json();
    byId("classes-title").textContent = "Among your texts";
    showClasses(answer.classes);
    say("compare-status", answer.note || "", "note");
    byId("look").scrollIntoView({ block: "start" });
  });
});

byId("file").addEventListener("change", (event) => {
  lookAtFile(event.target.files[0]);
  event.target.value = "";
});
const drop = byId("drop");
for (const name of ["dragover", "dragenter"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  lookAtFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => lookAtFile(event.clipboardData.files[0]));

ask("/api/about").then((response) => response.json()).then((about) => {
  const step = about.step === null ? "" : `, step ${about.step.toLocaleString("en")}`;
  state.maxUpload = about.max_upload;
  byId("about").textContent = `${about.model}${step} · ${about.images.toLocaleString("en")} images of ${about.images_of}`;
  byId("limit").textContent = `JPEG, PNG, WebP, GIF or BMP, up to ${about.max_upload / 2 ** 20} MiB. The model sees ${about.image_size} pixels.`;
}).catch((error) => { byId("about").textContent = error.message; });
