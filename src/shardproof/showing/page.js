"use strict";
(() => {
  const faults = [];
  window.addEventListener("error", (event) => faults.push(String(event.message)));
  window.addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));

  const root = document.documentElement;
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
    live.textContent = scene.querySelector("h2").textContent + ". " +
      scene.querySelector(".told").textContent;
    get("first").disabled = get("previous").disabled = now === 0;
    get("next").disabled = now === scenes.length - 1;
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
    timer = window.setTimeout(tick, pause(scenes[now]));
  }

  function start() {
    if (now === scenes.length - 1) go(0);
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

  /* What a test in a browser asks for: every position of the slider is tried, and the keys. */
  function selftest() {
    const seen = [];
    const expect = (holds, what) => { if (!holds) faults.push(what); };
    const isWide = () => root.scrollWidth > root.clientWidth;
    for (let place = 0; place < scenes.length; place += 1) {
      slider.value = String(place + 1);
      slider.dispatchEvent(new Event("input", { bubbles: true }));
      const shown = scenes.filter((each) => each.offsetHeight > 0), scene = scenes[place];
      const said = live.textContent;
      expect(shown.length === 1 && shown[0] === scene, `step ${place + 1} is not shown`);
      expect(scene.querySelectorAll("td").length > 0, `step ${place + 1} has no cells`);
      const drawn = scene.querySelectorAll(".arrows line").length;
      expect(drawn === Number(scene.dataset.arrows), `step ${place + 1} has ${drawn} arrows`);
      expect(said.includes(scene.querySelector("h2").textContent), `step ${place + 1} is not said`);
      expect(slider.getAttribute("aria-valuetext") !== "", `step ${place + 1} has no name`);
      expect(!isWide(), `step ${place + 1} is wider than the window`);
      for (const bar of scene.querySelectorAll(".bar i")) {
        expect(bar.offsetWidth <= bar.parentElement.offsetWidth, `a bar of step ${place + 1}`);
      }
      seen.push(place + 1);
    }
    const press = (key) => document.body.dispatchEvent(
      new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    press("Home");
    expect(now === 0, "Home");
    press("ArrowRight");
    expect(now === Math.min(1, scenes.length - 1), "ArrowRight");
    press("ArrowLeft");
    expect(now === 0, "ArrowLeft");
    get("next").click();
    get("previous").click();
    expect(now === 0, "the buttons");
    press(" ");
    window.setTimeout(() => {
      expect(scenes.length === 1 || now > 0, "playing");
      press(" ");
      expect(!timer, "pausing");
      const result = document.createElement("pre");
      result.id = "selftest";
      result.textContent = JSON.stringify({
        seen, faults, width: root.clientWidth,
        dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
      });
      document.body.append(result);
    }, 4000);
  }

  root.classList.add("js");
  slider.addEventListener("input", () => byHand(Number(slider.value) - 1));
  play.addEventListener("click", () => (timer ? stop : start)());
  get("first").addEventListener("click", () => byHand(0));
  get("previous").addEventListener("click", () => byHand(now - 1));
  get("next").addEventListener("click", () => byHand(now + 1));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => fromLink(window.location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[href^='#']") : null;
    if (link && fromLink(link.getAttribute("href"))) { event.preventDefault(); window.scrollTo(0, 0); }
  });
  if (scenes.length > 0) {
    go(0);
    fromLink(window.location.hash);
    if (window.location.hash === "#selftest") selftest();
  }
})();
