// The code of an exercise's solution is folded, as the words about it are.
document.addEventListener("DOMContentLoaded", () => {
  // A cell stands in a wrapper that has the same tags.
  for (const cell of document.querySelectorAll(".celltag_solution:not(.celltag_solution *)")) {
    const folded = document.createElement("details");
    const title = document.createElement("summary");
    title.textContent = "Solution, as code";
    cell.before(folded);
    folded.append(title, cell);
  }
});
