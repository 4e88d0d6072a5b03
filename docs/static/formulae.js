// Renders what the build has marked as a formula.
document.addEventListener("DOMContentLoaded", () =>
  document.querySelectorAll(".arithmatex").forEach((element) =>
    renderMathInElement(element, {
      delimiters: [
        { left: "\\(", right: "\\)", display: false },
        { left: "\\[", right: "\\]", display: true },
      ],
    })
  )
);
