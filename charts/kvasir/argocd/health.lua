-- The health of an LLMDeployment for Argo CD: the value of the key resource.customizations.health.kvasir.dev_LLMDeployment
-- of the ConfigMap argocd-cm. It follows the conditions as kstatus does.
local hs = { status = "Progressing", message = "the operator has not looked at it yet" }
if obj.status == nil or obj.status.conditions == nil then
  return hs
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  hs.message = "the operator has not looked at this generation yet"
  return hs
end
local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  conditions[condition.type] = condition
end
local function holds(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end
local function say(status, condition)
  hs.status = status
  hs.message = condition.reason
  if condition.message ~= nil and condition.message ~= "" then
    hs.message = condition.reason .. ": " .. condition.message
  end
  return hs
end
if holds("Stalled") then
  return say("Degraded", conditions["Stalled"])
end
if holds("Reconciling") then
  return say("Progressing", conditions["Reconciling"])
end
if holds("Ready") then
  return say("Healthy", conditions["Ready"])
end
if conditions["Ready"] ~= nil then
  return say("Progressing", conditions["Ready"])
end
return hs
