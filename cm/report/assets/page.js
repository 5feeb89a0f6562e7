"use strict";
// Values under the pointer, a filter of the runs, and two runs side by side, from the data that stands on the page.
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";
const off = new Set();                                  // numbers of the runs that the filter hides

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function key(colour, dash) {
  const made = element("svg", { class: `key run-${colour}`, viewBox: "0 0 26 8" });
  made.append(element("path", { class: `curve dash-${dash}`, d: "M1 4H25" }));
  return made;
}

function nearest(places, x) {
  let low = 0, high = places.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (places[middle] < x) low = middle; else high = middle;
  }
  return x - places[low] < places[high] - x ? low : high;
}

function line(curve, index) {
  const row = document.createElement("div"), value = document.createElement("b");
  value.textContent = curve.value[index];
  row.append(key(curve.run, curve.dash), curve.name, value);
  return row;
}

function follow(svg, all) {
  const mark = svg.querySelector(".pointer"), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  svg.addEventListener("pointermove", (event) => {
    const curves = all.filter((curve) => !off.has(curve.number));
    if (!curves.length) return;
    const frame = svg.getBoundingClientRect(), x = (event.clientX - frame.left) * width / frame.width;
    const places = curves.map((curve) => nearest(curve.x, x));
    const dots = curves.map((curve, n) => element("circle", {
      class: `run-${curve.run}`, cx: curve.x[places[n]], cy: curve.y[places[n]], r: 4,
    }));
    const closest = curves.reduce((best, curve, n) =>
      Math.abs(curve.x[places[n]] - x) < Math.abs(curves[best].x[places[best]] - x) ? n : best, 0);
    mark.replaceChildren(element("path", { d: `M${curves[closest].x[places[closest]]} 10V${height - 40}` }), ...dots);
    const head = document.createElement("div");
    head.textContent = `step ${curves[closest].at[places[closest]]}`;
    tip.replaceChildren(head, ...curves.map((curve, n) => line(curve, places[n])));
    tip.hidden = false;
    const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
  });
  svg.addEventListener("pointerleave", () => { mark.replaceChildren(); tip.hidden = true; });
}

for (const data of document.querySelectorAll("figure.plot script")) {
  follow(data.parentElement.querySelector("svg"), JSON.parse(data.textContent));
}

// --- several runs ----------------------------------------------------------------------------------------------------

const data = document.getElementById("runs");
const runs = data ? JSON.parse(data.textContent) : [];

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  off.clear();
  runs.forEach((run, number) => { if (!words.every((word) => run.words.includes(word))) off.add(number); });
  for (const each of document.querySelectorAll("[data-run]")) each.classList.toggle("off", off.has(Number(each.dataset.run)));
  document.getElementById("count").textContent = words.length ? `${runs.length - off.size} of ${runs.length} runs` : "";
}

function cell(text, kind) {
  const made = document.createElement(kind || "td");
  made.textContent = text === undefined ? "–" : text === "" ? "empty" : text;
  if (!text) made.className = "missing";
  return made;
}

function differences(a, b) {
  const table = document.createElement("table"), body = table.createTBody(), head = table.createTHead().insertRow();
  head.append(cell("flag", "th"), cell(a.name, "th"), cell(b.name, "th"));
  for (const flag of Object.keys({ ...a.flags, ...b.flags }).sort()) {
    if (flag === "log_dir" || a.flags[flag] === b.flags[flag]) continue;
    body.insertRow().append(cell(flag, "th"), cell(a.flags[flag]), cell(b.flags[flag]));
  }
  table.className = "settings columns";
  if (body.rows.length) return table;
  const same = document.createElement("p");
  same.textContent = "The two have the same flags.";
  return same;
}

function beside(number) {
  const column = document.createElement("div"), shot = document.querySelector(`#samples .shots[data-run="${number}"] label`);
  for (const part of [document.querySelector(`.cards [data-run="${number}"]`), shot]) {
    if (part) column.append(part.cloneNode(true));
  }
  for (const part of column.querySelectorAll("[data-run]")) { part.classList.remove("off"); part.removeAttribute("data-run"); }
  return column;
}

function compare(choices) {
  const [a, b] = choices.map((choice) => Number(choice.value));
  document.getElementById("pair").replaceChildren(beside(a), beside(b));
  document.getElementById("differences").replaceChildren(differences(runs[a], runs[b]));
}

if (runs.length > 1) {
  const box = document.getElementById("filter"), choices = [...document.querySelectorAll("#compare select")];
  box.addEventListener("input", () => filter(box.value));
  for (const [n, choice] of choices.entries()) {
    runs.forEach((run, number) => choice.add(new Option(run.name, number, false, number === n)));
    choice.addEventListener("change", () => compare(choices));
  }
  compare(choices);
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
}
