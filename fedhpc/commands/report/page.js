for (const part of document.querySelectorAll(".answers")) {
  const [round, words, found] = ["select", "input", "output"].map((name) => part.querySelector(name));
  const rows = [...part.querySelectorAll("tbody tr")];
  const show = () => {
    const wanted = words.value.trim().toLowerCase();
    for (const answer of part.querySelectorAll("[data-round]")) {
      answer.hidden = round.value !== "" && answer.dataset.round !== round.value;
    }
    for (const row of rows) {
      const answers = [...row.querySelectorAll("[data-round]")];
      row.querySelector(".none").hidden = answers.some((answer) => !answer.hidden);
      const texts = [...row.querySelectorAll(".whole")].filter((text) => !text.closest("[data-round][hidden]"));
      row.hidden = !texts.some((text) => text.textContent.toLowerCase().includes(wanted));
    }
    for (const group of part.querySelectorAll(".group")) {
      if (wanted && group.querySelector("tbody tr:not([hidden])")) group.open = true;
    }
    found.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} match` : "";
  };
  round.addEventListener("change", show);
  words.addEventListener("input", show);
  part.querySelector(".choose").hidden = false;
  show();
}
