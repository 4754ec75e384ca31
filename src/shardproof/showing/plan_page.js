"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const tree = get("tree");
  const all = [...tree.querySelectorAll("details")];
  const heads = () => [...tree.querySelectorAll("summary")].filter((head) => head.checkVisibility());

  function setAll(open) {
    for (const each of all) each.open = open || each === all[0];
  }

  /* As in any tree: up and down move, right opens or enters, left closes or leaves. */
  function onKey(event) {
    const head = event.target instanceof Element ? event.target.closest("summary") : null;
    if (!head || event.altKey || event.ctrlKey || event.metaKey) return;
    const module = head.parentElement, shown = heads(), at = shown.indexOf(head);
    const parent = module.parentElement.closest("details");
    let to = head;
    if (event.key === "ArrowDown") to = shown[at + 1];
    else if (event.key === "ArrowUp") to = shown[at - 1];
    else if (event.key === "Home") to = shown[0];
    else if (event.key === "End") to = shown[shown.length - 1];
    else if (event.key === "ArrowRight") {
      if (module.open) to = module.querySelector(":scope > .inside > details > summary");
      else module.open = true;
    } else if (event.key === "ArrowLeft") {
      if (module.open) module.open = false;
      else to = parent && parent.querySelector(":scope > summary");
    } else return;
    event.preventDefault();
    if (to) to.focus();
  }

  document.documentElement.classList.add("js");
  get("open").addEventListener("click", () => setAll(true));
  get("close").addEventListener("click", () => setAll(false));
  tree.addEventListener("keydown", onKey);
  window.addEventListener("beforeprint", () => setAll(true));
})();
