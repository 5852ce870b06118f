{{/* What the schema cannot see: values that do not fit together. Each message ends with the remedy. */}}

{{- define "kleash.check" -}}
{{- include "kleash.checkReward" . -}}
{{- include "kleash.checkModels" . -}}
{{- include "kleash.checkAuth" . -}}
{{- include "kleash.checkJobs" . -}}
{{- include "kleash.checkOverrides" . -}}
{{- include "kleash.checkPacked" . -}}
{{- include "kleash.checkOutside" . -}}
{{- $values := .Values -}}
{{- if $values.packed.enabled -}}
{{- range $values.packed.services -}}
{{- if not (index $values .).enabled -}}
{{- fail (printf "packed.services names %s, and %s.enabled is false; enable it or take it out" . .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key := list "policy" "reward" "reference" -}}
{{- $scaling := (index $values $key).autoscaling -}}
{{- if and $scaling.enabled (has $key (include "kleash.packedServices" $ | fromJsonArray)) -}}
{{- fail (printf "%s.autoscaling does nothing for a packed service; set packed.replicas, or take %s out of packed.services" $key $key) -}}
{{- end -}}
{{- if and $scaling.enabled (eq $scaling.kind "keda") (not $scaling.prometheusAddress) -}}
{{- fail (printf "%s.autoscaling.kind is keda, which asks Prometheus; set %s.autoscaling.prometheusAddress, such as http://prometheus.monitoring:9090" $key $key) -}}
{{- end -}}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling.minReplicas is %v and maxReplicas %v; the first must not be larger" $key $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- if and $values.reward.route.enabled (not $values.reward.route.parentRefs) -}}
{{- fail "reward.route is enabled and names no Gateway; set reward.route.parentRefs" -}}
{{- end -}}
{{- end -}}

{{- define "kleash.checkModels" -}}
{{- if .Values.demo.enabled -}}
{{- $isUsed := false -}}
{{- range list .Values.policy .Values.reward .Values.reference .Values.sft .Values.rewardModel -}}
{{- if regexMatch "^(demo://|pvc:///demo/)" .model.uri }}{{ $isUsed = true }}{{ end -}}
{{- end -}}
{{- range (include "kleash.rewardModels" . | fromJson).items -}}
{{- if regexMatch "^(demo://|pvc:///demo/)" .spec.uri }}{{ $isUsed = true }}{{ end -}}
{{- end -}}
{{- if not $isUsed -}}
{{- fail "demo.enabled is true and no model is one of the demo, whose prompts and learning rates the trainer would get; set demo.enabled=false" -}}
{{- end -}}
{{- end -}}
{{- range $component := concat (include "kleash.servingComponents" . | fromJsonArray) (list "trainer" "sft" "reward-model") -}}
{{- $key := include "kleash.valuesKey" $component -}}
{{- if (index $.Values $key).enabled -}}
{{- range (include "kleash.podModels" (dict "root" $ "component" $component) | fromJson).items -}}
{{- if not .model.uri -}}
{{- fail (printf "%s has no model (%s); set %s.model.uri, such as hf://org/name@revision or pvc://claim/path" $component .label $key) -}}
{{- end -}}
{{- if and (eq .model.scheme "demo") (not $.Values.demo.enabled) -}}
{{- fail (printf "the model %s of %s is made by the demo Job, and demo.enabled is false; enable it, set another model.uri, or use pvc:///demo/%s when an earlier run left it on the claim" .model.uri $component .model.name) -}}
{{- end -}}
{{- if and (eq .model.scheme "oci") (semverCompare "<1.33.0-0" $.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "the model %s needs image volumes, and Kubernetes %s has none (1.33 or newer has, with the feature gate ImageVolume before 1.35); use another model.uri" .model.uri $.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- $port := regexFind "^https://[^/]*:[0-9]+" .model.uri | regexFind "[0-9]+$" -}}
{{- if and $port $.Values.networkPolicy.enabled (not (has $port (include "kleash.texts" $.Values.networkPolicy.downloads.ports | fromJsonArray))) -}}
{{- fail (printf "the model %s of %s is at a port that the NetworkPolicy keeps closed; add %s to networkPolicy.downloads.ports" .model.uri $component $port) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Elements of a list as texts, as JSON. */}}
{{- define "kleash.texts" -}}
{{- $texts := list -}}
{{- range . }}{{ $texts = append $texts (toString .) }}{{ end -}}
{{- toJson $texts -}}
{{- end -}}

{{- define "kleash.checkAuth" -}}
{{- $auth := .Values.auth -}}
{{- if and (eq $auth.mode "token") (not $auth.token.existingSecret) -}}
{{- fail "auth.mode is token; set auth.token.existingSecret to a Secret with the servers' file of keys and the release's own key (README, Authentication)" -}}
{{- end -}}
{{- if and (include "kleash.hasTls" .) (not $auth.tls.existingSecret) (not $auth.tls.certManager.issuerRef.name) -}}
{{- fail (printf "TLS is on (auth.mode %s, auth.tls.enabled %v) without certificates; set auth.tls.existingSecret, or auth.tls.certManager.issuerRef.name" $auth.mode $auth.tls.enabled) -}}
{{- end -}}
{{- if and (include "kleash.hasTls" .) $auth.tls.existingSecret (not $auth.tls.serverName) -}}
{{- fail "auth.tls.existingSecret is one certificate for all servers; set auth.tls.serverName to a DNS name that it holds" -}}
{{- end -}}
{{- end -}}

{{- define "kleash.checkJobs" -}}
{{- $values := .Values -}}
{{- if gt (int $values.trainer.nodes) 1 -}}
{{- fail (printf "trainer.nodes is %v: the trainer is one process and cannot be spread over nodes yet; set it to 1 and give that pod more accelerators, or scale the services, which take most of a step" $values.trainer.nodes) -}}
{{- end -}}
{{- if $values.trainer.enabled -}}
{{- $services := $values.trainer.config.services | default dict -}}
{{- range $service := list "policy" "reward" "reference" -}}
{{- if and (not (index $values $service).enabled) (not (get $services $service)) -}}
{{- fail (printf "the trainer needs a %s service and %s.enabled is false; enable it, or set trainer.config.services.%s to the address of one" $service $service $service) -}}
{{- end -}}
{{- end -}}
{{- if and (not $values.demo.enabled) (not $values.trainer.config.prompts) -}}
{{- fail "the trainer has no prompts; set trainer.config.prompts to a JSON Lines file below /runs or to a Hugging Face dataset" -}}
{{- end -}}
{{- end -}}
{{- if and $values.sft.enabled (not $values.sft.config.data) -}}
{{- fail "sft has no demonstrations; set sft.config.data to a JSON Lines file below /runs or to a Hugging Face dataset" -}}
{{- end -}}
{{- if and $values.rewardModel.enabled (not $values.rewardModel.config.data) -}}
{{- fail "rewardModel has no comparisons; set rewardModel.config.data to a JSON Lines file below /runs or to a Hugging Face dataset" -}}
{{- end -}}
{{- if and $values.rewardModel.enabled (not $values.rewardModel.model.uri) (not $values.sft.enabled) -}}
{{- fail "rewardModel has no model to start from; set rewardModel.model.uri, or enable sft, which makes one" -}}
{{- end -}}
{{- end -}}

{{/*
Services outside of the release, whose way the NetworkPolicies would not know: the addresses of the
configuration that name no Service of the release.
*/}}
{{- define "kleash.checkOutside" -}}
{{- $values := .Values -}}
{{- if $values.networkPolicy.enabled -}}
{{- if and $values.tracing.endpoint (not $values.tracing.egress) -}}
{{- fail (printf "tracing.endpoint is %s, and the NetworkPolicies keep the way there closed; set tracing.egress to a rule that leads there, such as [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}}], ports: [{port: 4318}]}]" $values.tracing.endpoint) -}}
{{- end -}}
{{- if $values.trainer.enabled -}}
{{- $given := merge dict ($values.trainer.config.services | default dict) (ternary ($values.demo.trainerConfig.services | default dict) dict $values.demo.enabled) -}}
{{- range $service := list "policy" "reward" "reference" -}}
{{- $address := get $given $service -}}
{{- $own := printf "^(dns:///)?%s(-headless)?(:|[.]%s[.:])" (include "kleash.name" (dict "root" $ "component" $service)) $.Release.Namespace -}}
{{- $isOutside := false -}}
{{- range ternary $address (list $address) (kindIs "slice" $address) -}}
{{- if and . (not (regexMatch $own (toString .))) }}{{ $isOutside = true }}{{ end -}}
{{- end -}}
{{- $address = toJson $address -}}
{{- if and $isOutside (not $values.trainer.extraEgress) -}}
{{- fail (printf "trainer.config.services.%s is %s, outside of the release, and the trainer's NetworkPolicy keeps the way there closed; set trainer.extraEgress to a rule that leads there, such as [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}}], ports: [{port: 50051}]}]" $service $address) -}}
{{- end -}}
{{- if and $isOutside (eq $service "policy") (not $values.networkPolicy.weightsClients) -}}
{{- fail (printf "the policy at %s is outside of the release and fetches weights from port 50061 of the trainer, which its NetworkPolicy keeps closed; set networkPolicy.weightsClients to its pods, such as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}}]" $address) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $key := include "kleash.componentOf" (dict "root" . "service" "reward") -}}
{{- range (include "kleash.rewardModels" . | fromJson).items -}}
{{- if and $values.reward.enabled .config.remote (not (index $values $key).extraEgress) -}}
{{- fail (printf "reward.models.%s.config.remote is %s, outside of the release, and the NetworkPolicy of the reward service keeps the way there closed; set %s.extraEgress to a rule that leads there" .name .config.remote $key) -}}
{{- end -}}
{{- end -}}
{{- $publisher := dig "weights" "publisher" "" $values.policy.config -}}
{{- $key = include "kleash.componentOf" (dict "root" . "service" "policy") -}}
{{- if and $values.policy.enabled $publisher (not (index $values $key).extraEgress) -}}
{{- fail (printf "policy.config.weights.publisher is %s, outside of the release, and the policy's NetworkPolicy keeps the way there closed; set %s.extraEgress to a rule that leads there" $publisher $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
