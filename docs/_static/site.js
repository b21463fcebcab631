// What the theme leaves out for those who do not see the page, and those who have no mouse.
function name(box, label) {
  for (const each of document.querySelectorAll(box)) each.setAttribute("aria-label", label);
}
function reachable() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, math[display=block]"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
}
addEventListener("DOMContentLoaded", () => {
  name(".sidebar-drawer", "All pages");
  name(".toc-drawer", "On this page");
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.setAttribute("aria-level", 2);
  for (const cell of document.querySelectorAll("th"))
    if (!cell.textContent.trim()) cell.replaceWith(document.createElement("td"));
  if (!document.querySelector("h1")) {
    const title = document.createElement("h1");
    title.textContent = document.title.split(" - ")[0];
    document.querySelector("article").prepend(title);
  }
});
function sized() {  // figures are drawn for a page 7 inches wide, at 200 dots an inch: letters in all of the same size
  for (const figure of document.querySelectorAll("article img:not([src*=explorer])"))
    figure.style.maxWidth = `min(100%, ${0.6 * figure.naturalWidth}px)`;
}
addEventListener("load", () => { sized(); reachable(); });
addEventListener("resize", reachable);
