//! Prints the CustomResourceDefinition as YAML, for `crds/llmdeployments.yaml` and the chart's copy.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{}", kvasir_crds::llmdeployment::yaml()?);
    Ok(())
}
