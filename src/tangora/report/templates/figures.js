// Draws a figure when it comes near the window, and the others when there is nothing else to do. The library that
// draws is packed in the page, and unpacked for the first figure.
const plots = [...document.querySelectorAll(".plot")];
const touch = matchMedia("(pointer: coarse)").matches;
const drawings = new Map();
const hiddenRecipes = new Set();
let unpacking;

async function unpack() {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(
    new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")),
  ).text();
  document.head.append(script);
}

async function drawFirst(plot) {
  await (unpacking ??= unpack());
  const figure = JSON.parse(document.getElementById(plot.id + "-data").textContent);
  for (const trace of figure.data) if (hiddenRecipes.has(trace.meta)) trace.visible = false;
  if (touch) figure.layout.dragmode = false; // a finger on the figure scrolls the page
  await Plotly.newPlot(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}

function draw(plot) {
  if (!drawings.has(plot)) drawings.set(plot, drawFirst(plot));
  return drawings.get(plot);
}

// A click on a recipe in a key hides it in all figures.
function toggle(recipe) {
  const shown = hiddenRecipes.delete(recipe) || !hiddenRecipes.add(recipe);
  for (const entry of document.querySelectorAll(".key li")) {
    if (entry.dataset.recipe === recipe) entry.firstElementChild.setAttribute("aria-pressed", shown);
  }
  for (const plot of plots) {
    const traces = [...(plot.data ?? []).keys()].filter((index) => plot.data[index].meta === recipe);
    if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
  }
}

for (const entry of document.querySelectorAll(".key li")) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = "Show or hide in all figures";
  button.setAttribute("aria-pressed", true);
  button.append(...entry.childNodes);
  button.addEventListener("click", () => toggle(entry.dataset.recipe));
  entry.append(button);
}

// One of a figure's traces at a time.
for (const view of document.querySelectorAll("select[data-plot]")) {
  const plot = document.getElementById(view.dataset.plot);
  view.addEventListener("change", () => {
    const shown = [...view.options].map((_, index) => index === view.selectedIndex);
    draw(plot).then(() => Plotly.restyle(plot, { visible: shown }));
  });
}

if (typeof DecompressionStream === "undefined") {
  for (const plot of plots) plot.textContent = "The figures need a browser of 2023 or later.";
} else {
  const idle = window.requestIdleCallback
    ? (task) => requestIdleCallback(task, { timeout: 2000 })
    : (task) => setTimeout(task, 200);
  const near = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
    { rootMargin: "300px" },
  );
  plots.forEach((plot) => near.observe(plot));
  const drawRest = async (left) => {
    if (!left.length) return;
    await draw(left[0]);
    idle(() => drawRest(left.slice(1)));
  };
  addEventListener("load", () => setTimeout(() => idle(() => drawRest(plots)), 500)); // so that a print has all
}

const closed = [];
addEventListener("beforeprint", () => {
  closed.push(...document.querySelectorAll("details:not([open]):not(.run)"));
  closed.forEach((details) => (details.open = true));
  for (const plot of plots) if (plot.data) Plotly.relayout(plot, { width: Math.min(plot.clientWidth, 660) });
});
addEventListener("afterprint", () => {
  closed.splice(0).forEach((details) => (details.open = false));
  for (const plot of plots) if (plot.data) Plotly.relayout(plot, { width: null, autosize: true });
});
