"use strict";
// The episode browser: chooses which task and which models are shown. Without it everything is there, one below the other.
for (const browser of document.querySelectorAll(".browser")) {
  const form = browser.querySelector("form.chooser");
  if (!form) continue;
  const tasks = [...browser.querySelectorAll(".task")];
  const boxes = [...form.querySelectorAll('input[name="model"]')];
  const choice = form.querySelector('[name="task"]');
  const group = form.querySelector('[name="group"]');
  const status = form.querySelector('[role="status"]');
  const button = (name) => form.querySelector(`button[name="${name}"]`);

  const show = () => {
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const chosen = Number(choice.value);
    const told = [];
    tasks.forEach((task, number) => {
      task.hidden = number !== chosen;
      if (task.hidden) return;
      task.open = true;
      for (const episode of task.querySelectorAll(".episode")) {
        episode.hidden = !wanted.has(episode.dataset.model);
        if (episode.hidden) continue;
        episode.open = true;
        told.push(`${episode.querySelector("summary > :first-child").textContent} ${episode.dataset.action}`);
      }
    });
    const models = told.length ? told.join("; ") : "no model is chosen";
    status.textContent = `Task ${chosen + 1} of ${tasks.length}: ${models}.`;
  };
  const tick = (test) => boxes.forEach((box) => { box.checked = test(box); });
  // Round and round: a button that went dead under the finger would take the keyboard's focus along.
  const step = (by) => { choice.value = String((Number(choice.value) + by + tasks.length) % tasks.length); show(); };

  choice.addEventListener("change", show);
  boxes.forEach((box) => box.addEventListener("change", () => { if (group) group.value = ""; show(); }));
  if (group) group.addEventListener("change", () => {
    const names = group.value.split(" ");
    if (group.value) tick((box) => names.includes(box.value));
    show();
  });
  button("previous").addEventListener("click", () => step(-1));
  button("next").addEventListener("click", () => step(1));
  for (const [name, on] of [["all", true], ["clear", false]]) {
    button(name).addEventListener("click", () => { tick(() => on); if (group) group.value = ""; show(); });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
}
