"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const scenes = [...document.querySelectorAll(".scene")];
  const lines = [...document.querySelectorAll(".steps tbody tr")];
  const slider = get("slider"), where = get("where"), live = get("live"), play = get("play");
  const pause = (scene) => (scene.classList.contains("meets") ? 3200 : 1800);
  let now = 0, timer = 0;

  function go(place) {
    now = Math.min(Math.max(place, 0), scenes.length - 1);
    scenes.forEach((scene, each) => scene.classList.toggle("now", each === now));
    lines.forEach((line, each) => {
      line.classList.toggle("now", each === now);
      if (each === now) line.setAttribute("aria-current", "step");
      else line.removeAttribute("aria-current");
    });
    const scene = scenes[now];
    slider.value = String(now + 1);
    slider.setAttribute("aria-valuetext", scene.querySelector("h2").textContent);
    where.textContent = `${now + 1} of ${scenes.length}, ${scene.dataset.phase}`;
    if (!timer) {  // a reader cannot follow while the steps are played
      live.textContent = scene.querySelector("h2").textContent + ". " +
        scene.querySelector(".told").textContent;
    }
    markWide(scene);
    get("first").disabled = get("previous").disabled = now === 0;
    get("next").disabled = now === scenes.length - 1;
  }

  /* Only what is wider than its place can be scrolled, and says so. */
  function markWide(scene) {
    for (const box of scene.querySelectorAll(".scroll")) {
      const isWide = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("wide", isWide);
      for (const [name, value] of [["role", "region"], ["tabindex", "0"], ["aria-label", box.dataset.label]]) {
        if (isWide) box.setAttribute(name, value);
        else box.removeAttribute(name);
      }
    }
  }

  /* On a phone the legend stands above the step: the step begins at the top of the window. */
  function toTop() {
    if (window.matchMedia("(max-width: 46rem)").matches) scenes[now].scrollIntoView({ block: "start" });
  }

  function stop() {
    window.clearTimeout(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }

  function tick() {
    if (now === scenes.length - 1) { stop(); return; }
    go(now + 1);
    toTop();
    timer = window.setTimeout(tick, pause(scenes[now]));
  }

  function start() {
    if (now === scenes.length - 1) go(0);
    toTop();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = window.setTimeout(tick, pause(scenes[now]));
  }

  function byHand(place) { stop(); go(place); }

  function onKey(event) {
    const target = event.target instanceof Element ? event.target : document.body;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const isButton = target.closest("button, summary, a") !== null;
    const isOwn = target === slider || target.closest(".scroll") !== null;
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: scenes.length - 1 };
    if (event.key in moves && !isOwn) byHand(moves[event.key]);
    else if (event.key === " " && !isButton) (timer ? stop : start)();
    else return;
    event.preventDefault();
  }

  function fromLink(hash) {
    const found = /^#step-(\d+)$/.exec(hash);
    if (found) byHand(Number(found[1]) - 1);
    return found !== null;
  }

  document.documentElement.classList.add("js");
  slider.addEventListener("input", () => byHand(Number(slider.value) - 1));
  play.addEventListener("click", () => (timer ? stop : start)());
  get("first").addEventListener("click", () => byHand(0));
  get("previous").addEventListener("click", () => byHand(now - 1));
  get("next").addEventListener("click", () => byHand(now + 1));
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", () => markWide(scenes[now]));
  window.addEventListener("hashchange", () => fromLink(window.location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[href^='#']") : null;
    if (link && fromLink(link.getAttribute("href"))) { event.preventDefault(); window.scrollTo(0, 0); }
  });
  if (scenes.length > 0) {
    go(0);
    fromLink(window.location.hash);
  }
})();
