"use strict";
// Values under the pointer: each curve's nearest point, from the data that stands beside the drawing.
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
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
  const row = document.createElement("div"), badge = document.createElement("i"), value = document.createElement("b");
  badge.className = `badge run-${curve.run}`;
  value.textContent = curve.value[index];
  row.append(badge, curve.name, value);
  return row;
}

function follow(svg, curves) {
  const mark = svg.querySelector(".pointer"), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  svg.addEventListener("pointermove", (event) => {
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
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  });
  svg.addEventListener("pointerleave", () => { mark.replaceChildren(); tip.hidden = true; });
}

for (const data of document.querySelectorAll("figure.plot script")) {
  follow(data.parentElement.querySelector("svg"), JSON.parse(data.textContent));
}
