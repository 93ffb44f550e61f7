// The solution of an exercise is folded: the whole cell, code and what it prints.
document.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll(".celltag_solution")) {
    const folded = document.createElement("details");
    const title = document.createElement("summary");
    title.textContent = "Solution";
    cell.before(folded);
    folded.append(title, cell);
  }
});
